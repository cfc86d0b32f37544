"""Pictures of one color, and webdataset shards of anything."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image


def plain(color: int | tuple[int, int, int], size: int = 8) -> bytes:
    """A PNG file of one level of grey, or color."""
    buffer = io.BytesIO()
    rgb = (color, color, color) if isinstance(color, int) else color
    Image.new("RGB", (size, size), rgb).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(shard: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Write names and contents in order; the folder is made."""
    shard.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(shard, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return shard
