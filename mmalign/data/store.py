"""A folder of tensors by key: safetensors shards, each beside an index with its hash.

Nothing is shared between shards, so processes that write the same folder at once do no harm, and a
shard that is damaged costs only itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from mmalign.data.files import atomic_path, write_bytes
from mmalign.data.readers import BAR_DELAY
from mmalign.types import InputError

logger = logging.getLogger(__name__)
OPEN_SHARDS = 64


class TensorStore:
    """Entries of named tensors, found by key; shards are opened when an entry is asked for."""

    def __init__(self, folder: Path) -> None:
        """Open a folder, which need not exist, and verify every shard in it.

        A shard that is damaged is removed with a warning: its entries are missing then.
        """
        self.folder = folder
        self._shards: dict[str, str] = {}
        self._open: OrderedDict[str, tuple[Any, dict[str, list[str]]]] = OrderedDict()
        indices = sorted(folder.glob("*.json")) if folder.is_dir() else []
        for index in tqdm(indices, desc="verify cache", unit="shard", delay=BAR_DELAY):
            try:
                keys = _verified_keys(index)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                logger.warning("cache %s is damaged and is computed again: %s", index, error)
                _remove(index)
                continue
            self._shards.update(dict.fromkeys(keys, index.with_suffix(".safetensors").name))

    def __contains__(self, key: object) -> bool:
        """Tell whether an entry is there."""
        return key in self._shards

    def write(self, prefix: str, entries: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write entries as one shard, named after its keys; the index comes last.

        Raises:
            InputError: if the folder cannot be written.
        """
        digest = hashlib.blake2b("\n".join(entries).encode(), digest_size=8).hexdigest()
        shard = self.folder / f"{prefix}-{digest}.safetensors"
        tensors = {
            f"{key}.{name}": tensor.contiguous()
            for key, entry in entries.items()
            for name, tensor in entry.items()
        }
        with atomic_path(shard) as temporary:
            try:
                save_file(tensors, temporary)
            except SafetensorError as error:
                raise OSError(str(error)) from error
            record = {"hash": _hash_file(temporary), "entries": list(entries)}
        write_bytes(shard.with_suffix(".json"), json.dumps(record).encode())
        self._open.pop(shard.name, None)
        self._shards.update(dict.fromkeys(entries, shard.name))

    def read(self, key: str) -> dict[str, Tensor]:
        """Read one entry.

        Raises:
            InputError: if its shard was damaged or removed since the store was opened.
        """
        shard = self._shards[key]
        try:
            handle, names = self._handle(shard)
            # Copies: what the handle returns is mapped, and changes with the file.
            return {name: handle.get_tensor(f"{key}.{name}").clone() for name in names[key]}
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"cache {self.folder / shard} cannot be read: {error}; start again to repair it"
            ) from error

    def __getstate__(self) -> dict[str, object]:
        """Leave open files behind when sent to another process."""
        return {**self.__dict__, "_open": OrderedDict()}

    def _handle(self, shard: str) -> tuple[Any, dict[str, list[str]]]:
        if shard not in self._open:
            handle = safe_open(self.folder / shard, framework="pt")
            names: dict[str, list[str]] = defaultdict(list)
            for full_name in _names(handle):
                key, _, name = full_name.partition(".")
                names[key].append(name)
            self._open[shard] = handle, names
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]


def _verified_keys(index: Path) -> list[str]:
    record = json.loads(index.read_bytes())
    shard = index.with_suffix(".safetensors")
    if _hash_file(shard) != record["hash"]:
        raise ValueError(f"{shard.name} does not have the hash that its index says")
    keys = record["entries"]
    with safe_open(shard, framework="pt") as handle:
        present = {name.partition(".")[0] for name in _names(handle)}
    if not isinstance(keys, list) or set(keys) != present:
        raise ValueError(f"{shard.name} does not have the entries that its index says")
    return keys


def _names(handle: Any) -> list[str]:
    return list(handle.keys())


def _hash_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()


def _remove(index: Path) -> None:
    for path in (index, index.with_suffix(".safetensors")):
        with suppress(OSError):
            path.unlink()
