"""What a run of a comparison reads besides its flags, to tell an edited file from an unchanged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from mmalign.config import as_path

FILES = ("prompts", "questions", "path")
"""Names of options whose file decides what comes out."""


def inputs_of(parsed: Any, seed: int) -> list[str]:
    """List the resolved options as `name: value`, and the input files as `name contents: hash`.

    Args:
        parsed: options with those of the config file.
        seed: stands for `{seed}` in names of files.
    """
    lines = []
    for name, value in _leaves(asdict(parsed), ""):
        lines.append(f"{name}: {json.dumps(value, default=str)}")
        if name.rpartition(".")[2] in FILES and value:
            file = as_path(str(value).replace("{seed}", str(seed)))
            if file.is_file():
                with file.open("rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                lines.append(f"{name} contents: {digest[:16]}")
    return lines


def _leaves(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield dotted names and their values; a list is one value."""
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, f"{prefix}.{key}".lstrip("."))
