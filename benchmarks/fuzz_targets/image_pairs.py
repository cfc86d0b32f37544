"""Readers of preferences between images, and of images."""

from __future__ import annotations

import shutil
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

from .harness import parquet, png, target

PAIR: dict[str, Any] = {
    "prompt": "red",
    "chosen_file_name": "a.png",
    "rejected_file_name": "b.png",
    "score_chosen": 1.5,
    "margin": None,
}
HPD: dict[str, Any] = {
    "prompt": "red",
    "image_path": ["a.png", "b.png"],
    "human_preference": [1, 0],
}


def _images(folder: Path, path: Path, format: str = "auto") -> None:
    from mmalign.data.detect import open_source
    from mmalign.data.readers import scan

    found = scan(open_source(str(path), format), max_pixels=10_000, full=True)
    for pair in found.pairs:
        assert pair.prompt


@target(PAIR, share=3)
def image_pairs_jsonl(folder: Path, data: bytes) -> None:
    """Read `metadata.jsonl`."""
    (folder / "metadata.jsonl").write_bytes(data)
    _images(folder, folder / "metadata.jsonl")


@target([HPD], share=3)
def image_pairs_hpd(folder: Path, data: bytes) -> None:
    """Read HPDv2's `train.json`."""
    (folder / "train.json").write_bytes(data)
    _images(folder, folder / "train.json")


@target(
    parquet({"prompt": "red", "chosen": png(), "rejected": "b.png"}),
    parquet({"caption": "r", "jpg_0": png(), "jpg_1": b"x", "label_0": 1.0, "label_1": 0.0}),
    share=3,
)
def image_pairs_parquet(folder: Path, data: bytes) -> None:
    """Read canonical columns and Pick-a-Pic."""
    (folder / "pairs.parquet").write_bytes(data)
    _images(folder, folder / "pairs.parquet")


def _tar() -> bytes:
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in (
            ("k.json", b'{"prompt": "red"}'),
            ("k.chosen.png", png()),
            ("k.rejected.png", png()),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, BytesIO(content))
    return buffer.getvalue()


@target(_tar(), share=3)
def image_pairs_tar(folder: Path, data: bytes) -> None:
    """Read a webdataset shard."""
    (folder / "pairs.tar").write_bytes(data)
    _images(folder, folder / "pairs.tar")


@target({"file_name": "1", "prompt": "red", "margin": 0.5}, share=3)
def image_pairs_folders(folder: Path, data: bytes) -> None:
    """Read folders of winners and losers with a table of prompts."""
    root = folder / "folders"
    for side, name in (("w", "a.png"), ("l", "b.png")):
        (root / side).mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, root / side / "1.png")
    (root / "prompts.jsonl").write_bytes(data)
    _images(root, root)


@target(png())
def image(folder: Path, data: bytes) -> None:
    """Decode an image."""
    from mmalign.data.images import image_suffix, open_image
    from mmalign.types import ImageRef

    assert open_image(ImageRef(data, "here"), max_pixels=10_000).mode == "RGB"
    assert image_suffix(ImageRef(data, "here"), 10_000)
