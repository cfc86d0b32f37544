"""What a target is, and what several of them write."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from mmalign.types import InputError

Read = Callable[[Path, bytes], object]


@dataclass(frozen=True, slots=True)
class Target:
    """A reader of foreign bytes.

    Attributes:
        read: Puts bytes into a folder, where the reader looks, and reads them.
        seeds: Bytes to begin with.
        sound: Whether every seed is read to the end, rather than refused.
        share: Of the campaign's time, relative to other targets.
    """

    read: Read
    seeds: tuple[bytes, ...]
    sound: bool
    share: int


TARGETS: dict[str, Target] = {}


def target(
    *seeds: bytes | dict[str, Any] | list[Any], sound: bool = True, share: int = 1
) -> Callable[[Read], Read]:
    """Add a target by the name of its function; seeds that are not bytes are written as JSON."""
    encoded = tuple(s if isinstance(s, bytes) else json.dumps(s).encode() for s in seeds)

    def add(read: Read) -> Read:
        TARGETS[read.__name__] = Target(read, encoded, sound, share)
        return read

    return add


def check(name: str, folder: Path, data: bytes) -> bool:
    """Run a target; tells whether it read the bytes. Findings leave as the exception they are."""
    try:
        TARGETS[name].read(folder, data)
    except InputError as error:
        said = str(error)
    else:
        return True
    assert "\n" not in said, f"more than one line: {said}"
    return False


def prepare(folder: Path) -> None:
    """Put two images into the folder."""
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (4, 4), color).save(folder / name)


def png() -> bytes:
    """Encode a small image."""
    buffer = BytesIO()
    Image.new("RGB", (2, 2), "red").save(buffer, "PNG")
    return buffer.getvalue()


def parquet(record: dict[str, Any]) -> bytes:
    """Encode a table of one row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = BytesIO()
    pq.write_table(pa.Table.from_pylist([record]), buffer)
    return buffer.getvalue()
