"""What a reward's scores depend on besides the samples: for caches of scores."""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.config import as_path
from mmalign.scoring import scores_sets

if TYPE_CHECKING:
    from mmalign.config import RewardConfig
    from mmalign.types import Reward, TextReward

BLOCK = 2**22
PREFIXES = ("local-dir:", "hf-hub:")


def reward_identity(config: RewardConfig, reward: Reward | TextReward) -> dict[str, Any] | None:
    """Describe a reward, as `describe_reward`, where its scores may be kept for other runs.

    A reward may have an attribute `fingerprint` that says what else its scores depend on, such as
    the revision of a server. None there means that equal samples may get other scores, as when
    people judge; so it is with a reward that scores a sample against others.

    Returns:
        The description, or None where scores may not be kept.

    Raises:
        OSError: if a file it names cannot be read.
    """
    if getattr(reward, "fingerprint", "") is None or scores_sets(reward):
        return None
    return describe_reward(config, reward)


def describe_reward(config: RewardConfig, reward: Reward | TextReward) -> dict[str, Any]:
    """Describe a reward so that two with equal descriptions are the same reward.

    That is its name and options, its fingerprint, the source file it is defined in, the version of
    this package, and the contents of every file or folder that its options or defaults name; for a
    repository of the hub, the commit that lies in the local cache.

    Raises:
        OSError: if a file it names cannot be read.
    """
    source = _source(reward)
    named = dict(_named(config.options)) | dict(_defaults(reward, config.options))
    return {
        "name": config.name,
        "options": config.options,
        "fingerprint": getattr(reward, "fingerprint", ""),
        "mmalign": version("mmalign"),
        "code": None if source is None else _hash_path(source),
        "files": {text: state for text in sorted(named.values()) if (state := _state(text))},
    }


def _source(reward: object) -> Path | None:
    """Find the file that defines a reward, or the function that it wraps."""
    target: Any = getattr(reward, "function", type(reward))
    while isinstance(target, partial):
        target = target.func
    try:
        file = inspect.getsourcefile(inspect.unwrap(target))
    except TypeError:  # an instance that is called: its class says how
        file = inspect.getsourcefile(type(target))
    return None if file is None else Path(file)


def _named(value: object, place: str = "") -> Iterator[tuple[str, str]]:
    """List every text in options, with where it stands."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named(item, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _named(item, f"{place}[{index}]")


def _defaults(reward: object, options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """List texts that stand for files where options are left out."""
    for name, parameter in inspect.signature(type(reward)).parameters.items():
        if name not in options and isinstance(parameter.default, str):
            yield f".{name}", parameter.default
    module = sys.modules.get(type(reward).__module__)
    for name, value in vars(module).items() if module else ():
        if isinstance(value, str) and value.startswith("pkg://"):
            yield name, value


def _state(text: str) -> str | None:
    """Hash what a text names, if it names a file, a folder or a cached repository."""
    for prefix in PREFIXES:
        text = text.removeprefix(prefix)
    try:
        path = as_path(text)
        exists = bool(text.strip()) and path.exists()
    except (OSError, ValueError, ModuleNotFoundError):
        return None
    return _hash_path(path) if exists else _commit(text)


def _hash_path(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else ""
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()


def _commit(text: str) -> str | None:
    """Read which commit of a hub's repository lies in the local cache."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) is None:
        return None
    from huggingface_hub.constants import HF_HUB_CACHE

    reference = Path(HF_HUB_CACHE) / f"models--{text.replace('/', '--')}" / "refs" / "main"
    return reference.read_text().strip() if reference.is_file() else None
