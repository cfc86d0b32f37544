"""Readers of checkpoints, adapters and the database of labels."""

from __future__ import annotations

import hashlib
import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmalign.types import InputError

from .harness import target

MANIFEST = {
    "format": 1,
    "step": 2,
    "files": {"state.json": {"bytes": 3, "sha256": "00"}, "a.safetensors": {"bytes": 1}},
}


LORA = {"unet.a.lora_A.weight": [[1.0, 2.0]], "unet.a.lora_B.weight": [[1.0]]}
SETTINGS = {"unet.r": 1, "unet.lora_alpha": 2.0, "unet.rank_pattern": {"a": 2}}


def _safetensors(tensors: dict[str, Any], metadata: dict[str, str]) -> bytes:
    import torch
    from safetensors.torch import save

    return save({name: torch.tensor(v) for name, v in tensors.items()}, metadata)


def _checkpoint(folder: Path) -> Path:
    import torch

    from mmalign.checkpoint import save_checkpoint

    place = folder / "checkpoints" / "checkpoint-2"
    if not place.exists():
        tensors = {"model": {"w": torch.ones(2)}, "training": {"m": torch.ones(2)}}
        save_checkpoint(place.parent, 2, tensors, {"run": {}, "training": {"dict": []}}, 1)
    return place


@target(MANIFEST, sound=False)
def checkpoint_manifest(folder: Path, data: bytes) -> None:
    """Load a checkpoint whose manifest somebody else wrote."""
    from mmalign.checkpoint import latest_checkpoint, load_checkpoint

    place = _checkpoint(folder)
    (place / "manifest.json").write_bytes(data)
    with suppress(InputError):
        load_checkpoint(place)
    latest_checkpoint(place.parent)


def _sealed(place: Path, name: str, data: bytes) -> None:
    """Write a file of a checkpoint and make the manifest fit."""
    (place / name).write_bytes(data)
    files = {
        file.name: {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in place.iterdir()
        if file.name != "manifest.json"
    }
    manifest = {"format": 1, "step": 2, "files": files}
    (place / "manifest.json").write_text(json.dumps(manifest))


@target({"run": {}, "training": {"dict": [["optimizer", {"dict": []}]]}})
def checkpoint_state(folder: Path, data: bytes) -> None:
    """Load a checkpoint whose state somebody else wrote, with a manifest that fits."""
    from mmalign.checkpoint import load_checkpoint

    place = _checkpoint(folder)
    _sealed(place, "state.json", data)
    assert isinstance(load_checkpoint(place).state, dict)


@target(_safetensors({"w": [1.0, 2.0]}, {"format": "pt"}))
def checkpoint_tensors(folder: Path, data: bytes) -> None:
    """Load a checkpoint whose tensors somebody else wrote, with a manifest that fits."""
    from mmalign.checkpoint import load_checkpoint

    place = _checkpoint(folder)
    _sealed(place, "model.safetensors", data)
    load_checkpoint(place)


@target(_safetensors(LORA, {"lora_adapter_metadata": json.dumps(SETTINGS)}))
def lora_file(folder: Path, data: bytes) -> None:
    """Read an adapter's file."""
    from mmalign.lora import read_lora

    (folder / "lora.safetensors").write_bytes(data)
    read_lora(folder / "lora.safetensors")


@target(SETTINGS)
def lora_metadata(folder: Path, data: bytes) -> None:
    """Read an adapter's metadata, inside a sound file."""
    from mmalign.lora import read_lora

    metadata = {"lora_adapter_metadata": data.decode("utf-8", "replace")}
    (folder / "lora.safetensors").write_bytes(_safetensors(LORA, metadata))
    for value in read_lora(folder / "lora.safetensors").settings.values():
        assert isinstance(value, int | float | dict)


@target({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {"a": 1.5}})
def vlm_lora_settings(folder: Path, data: bytes) -> None:
    """Read `adapter_config.json` of PEFT."""
    from mmalign.vlm_lora import read_vlm_lora

    place = folder / "peft"
    place.mkdir(exist_ok=True)
    tensors = {"base_model.model.a.lora_A.weight": [[1.0]]}
    (place / "adapter_model.safetensors").write_bytes(_safetensors(tensors, {"format": "pt"}))
    (place / "adapter_config.json").write_bytes(data)
    read_vlm_lora(place)


@target(b"SQLite format 3\0" + struct.pack(">H", 4096) + b"\0" * 4078, sound=False)
def label_database(folder: Path, data: bytes) -> None:
    """Open a database of labels."""
    from mmalign.data.labels import Labels

    for name in ("labels.sqlite", "labels.sqlite-wal", "labels.sqlite-shm"):
        (folder / name).unlink(missing_ok=True)
    (folder / "labels.sqlite").write_bytes(data)
    labels = Labels(folder / "labels.sqlite")
    try:
        labels.images()
        labels.tallies()
    finally:
        labels.close()
