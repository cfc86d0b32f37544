"""The index of a model's weights in several files, which may be a stranger's."""

from __future__ import annotations

import json
import re
from pathlib import Path

from mmalign.types import InputError


def refuse_foreign_shards(
    location: str,
    *,
    subfolder: str = "",
    variant: str | None = None,
    revision: str | None = None,
    offline: bool = False,
) -> None:
    """Refuse weights in parts whose index names files of other folders.

    diffusers refuses them itself; transformers would open whatever is named.

    Args:
        location: local folder or hub id.
        subfolder: of the component.
        variant: of the weights' files.
        revision: of the hub.
        offline: look in the hub's local cache only.

    Raises:
        InputError: naming the index, if it does so or is damaged.
    """
    from transformers.utils import cached_file

    middle = "" if variant is None else f".{variant}"
    try:
        index = cached_file(
            location,
            f"model.safetensors.index{middle}.json",
            subfolder=subfolder,
            revision=revision,
            local_files_only=offline,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise InputError(f"{location}: its files cannot be looked up: {lines[0]}") from error
    if index is None:
        return
    try:
        names = list(json.loads(Path(index).read_text("utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index}: is no index of weights: {str(error)[:80]!r}") from error
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name):
            raise InputError(f"{index}: names {str(name)[:80]!r}, which is no file beside it")
