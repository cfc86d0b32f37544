"""Atomic, verified checkpoints.

A checkpoint is a folder `checkpoint-<step>` of safetensors and JSON files with a `manifest.json`
that names every file, its size and its SHA-256. It is written as `.tmp-<step>`, the manifest last,
then renamed in one `os.replace`; older checkpoints are removed only afterwards. A process killed at
any moment therefore leaves every checkpoint that existed before, and what it leaves half done never
has the name of a checkpoint. Nothing is pickled, neither on the way in nor on the way out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmalign.types import InputError

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"\.(tmp|old)-\d+")

logger = logging.getLogger(__name__)


class DamagedCheckpointError(InputError):
    """A checkpoint that does not match its manifest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        path: its folder.
        step: optimizer steps done.
        tensors: groups of named tensors on CPU, one safetensors file each.
        state: the JSON state.
    """

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    json_state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write `checkpoint-<step>` into `folder` and remove older ones beyond `keep`.

    Args:
        folder: holds all checkpoints of a run; created when missing.
        step: optimizer steps done.
        tensors: groups of named tensors; each group becomes `<group>.safetensors`.
        json_state: what JSON can hold; floats survive exactly.
        keep: newest checkpoints that remain, at least 1.

    Returns:
        The folder of the new checkpoint.

    Raises:
        InputError: the disk is full or the folder cannot be written. Older checkpoints are
            untouched and the half-written one is removed.
    """
    temporary, final = folder / f".tmp-{step}", folder / f"checkpoint-{step}"
    with _one_line_errors(folder, temporary):
        _clear_leftovers(folder)
        temporary.mkdir(parents=True)
        files: dict[str, dict[str, int | str]] = {}
        for group, values in tensors.items():
            name = f"{group}.safetensors"
            save_file({key: _plain(value) for key, value in values.items()}, temporary / name)
            files[name] = _seal(temporary / name)
        _write_json(temporary / STATE, dict(json_state))
        files[STATE] = _seal(temporary / STATE)
        _write_json(temporary / MANIFEST, {"format": FORMAT, "step": step, "files": files})
        _sync(temporary / MANIFEST)
        _sync(temporary)
        _move_into_place(temporary, final)
        _sync(folder)
        _rotate(folder, step, keep)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in `folder`, valid or not, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Read the step from the name of a checkpoint folder.

    Raises:
        InputError: the name is not `checkpoint-<step>`.
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise InputError(f"{path}: not a checkpoint, its name must be checkpoint-<step>")
    return int(match.group(1))


def latest_checkpoint(folder: Path) -> Path | None:
    """Find the newest checkpoint whose files match its manifest.

    Damaged ones are skipped, each with a warning that names it.

    Returns:
        The folder, or None when `folder` holds no checkpoint at all.

    Raises:
        InputError: there are checkpoints and every one is damaged.
    """
    checkpoints = list_checkpoints(folder)
    for path in reversed(checkpoints):
        try:
            _verify(path)
        except DamagedCheckpointError as error:
            logger.warning("skipped a damaged checkpoint: %s", error)
        else:
            return path
    if checkpoints:
        raise InputError(
            f"{folder}: all {len(checkpoints)} checkpoints are damaged; remove them to start over"
        )
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Load a checkpoint after checking every file against the manifest.

    Raises:
        InputError: the folder is missing or damaged.
    """
    manifest = _verify(path)
    state: Any
    tensors: dict[str, dict[str, Tensor]] = {}
    try:
        for name in manifest["files"]:
            if name.endswith(".safetensors"):
                tensors[name.removesuffix(".safetensors")] = load_file(path / name)
        state = json.loads((path / STATE).read_text("utf-8"))
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise DamagedCheckpointError(f"{path}: cannot be read ({error})") from error
    if not isinstance(state, dict):
        raise DamagedCheckpointError(f"{path}: its {STATE} is not a JSON object")
    return Checkpoint(path=path, step=manifest["step"], tensors=tensors, state=state)


def pack(tree: object) -> tuple[Any, dict[str, Tensor]]:
    """Split nested state into JSON and tensors, the inverse of `unpack`.

    Args:
        tree: dicts (keys of str or int), lists, tuples, tensors, str, int, float, bool and None.

    Returns:
        The JSON skeleton and the tensors it refers to by name.

    Raises:
        TypeError: something else is in the tree.
    """
    tensors: dict[str, Tensor] = {}

    def walk(node: object, name: str) -> Any:
        if isinstance(node, Tensor):
            tensors[name] = node
            return {"tensor": name}
        if isinstance(node, Mapping):
            return {"dict": [[_key(k), walk(v, f"{name}.{k}")] for k, v in node.items()]}
        if isinstance(node, list | tuple):
            kind = "list" if isinstance(node, list) else "tuple"
            return {kind: [walk(item, f"{name}.{i}") for i, item in enumerate(node)]}
        if node is None or isinstance(node, str | int | float):
            return node
        raise TypeError(f"{name}: cannot save a {type(node).__name__} in a checkpoint")

    return walk(tree, "state"), tensors


def unpack(skeleton: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Rebuild what `pack` split."""
    if not isinstance(skeleton, dict):
        return skeleton
    ((kind, content),) = skeleton.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unpack(value, tensors) for key, value in content}
    items = [unpack(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)


def _key(key: object) -> str | int:
    if isinstance(key, bool) or not isinstance(key, str | int):
        raise TypeError(f"keys of saved state must be str or int, not {key!r}")
    return key


def _plain(value: Tensor) -> Tensor:
    """Copy to contiguous CPU memory that no other tensor shares, as safetensors demands."""
    return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _seal(path: Path) -> dict[str, int | str]:
    _sync(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1), "utf-8")


def _move_into_place(temporary: Path, final: Path) -> None:
    if final.exists():  # a damaged checkpoint that `latest` stepped over, reached again
        aside = final.with_name(f".old-{step_of(final)}")
        os.replace(final, aside)
        os.replace(temporary, final)
        shutil.rmtree(aside)
    else:
        os.replace(temporary, final)


def _rotate(folder: Path, step: int, keep: int) -> None:
    """Remove all but the newest `keep` up to `step`; this run did not write what lies beyond."""
    ours = [path for path in list_checkpoints(folder) if step_of(path) <= step]
    for path in ours[: -max(keep, 1)]:
        # Out of sight first: a removal that is interrupted must not leave half a checkpoint behind.
        aside = path.with_name(f".old-{step_of(path)}")
        os.replace(path, aside)
        shutil.rmtree(aside)


def _clear_leftovers(folder: Path) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():
        if _LEFTOVER.fullmatch(path.name):
            if path.is_symlink() or not path.is_dir():
                path.unlink()
            else:
                shutil.rmtree(path)


@contextmanager
def _one_line_errors(folder: Path, temporary: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(
            f"{folder}: cannot write a checkpoint ({error}); free space or fix permissions, then"
            " resume: earlier checkpoints are intact"
        ) from error


def _verify(path: Path) -> dict[str, Any]:
    """Check every file against the manifest and return the manifest."""
    step = step_of(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such checkpoint folder")
    manifest = _read_manifest(path)
    if manifest["step"] != step:
        raise DamagedCheckpointError(f"{path}: its manifest is of step {manifest['step']}")
    checks: list[Callable[[Path, Mapping[str, Any]], str | None]] = [_wrong_size, _wrong_hash]
    for check in checks:  # all sizes first: cheap, and they catch truncation
        for name, entry in manifest["files"].items():
            problem = check(path / name, entry)
            if problem is not None:
                raise DamagedCheckpointError(f"{path}: {name} {problem}")
    return manifest


def _wrong_size(path: Path, entry: Mapping[str, Any]) -> str | None:
    if path.is_symlink() or not path.is_file():
        return "is missing or a link"
    size = path.stat().st_size
    return None if size == entry["bytes"] else f"has {size} bytes instead of {entry['bytes']}"


def _wrong_hash(path: Path, entry: Mapping[str, Any]) -> str | None:
    return None if _sha256(path) == entry["sha256"] else "does not match its SHA-256"


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        version, step, files = manifest["format"], manifest["step"], manifest["files"]
        # A manifest from elsewhere must not make us read outside its folder.
        sound = isinstance(step, int) and all(name == Path(name).name for name in files)
        sound = (
            sound
            and STATE in files
            and all(e["bytes"] >= 0 and e["sha256"] for e in files.values())
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedCheckpointError(f"{path}: no readable {MANIFEST} ({error})") from error
    if version != FORMAT or not sound:
        raise DamagedCheckpointError(f"{path}: its {MANIFEST} is not one this version reads")
    return dict(manifest)
