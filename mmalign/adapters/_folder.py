"""Where the name of a model leads: a local folder or a hub id."""

from __future__ import annotations

import re
from pathlib import Path

from mmalign.config import as_path
from mmalign.types import InputError


def first_line(error: BaseException) -> str:
    """Return the first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def local_folder(model: str, wanted: str) -> Path | None:
    """Resolve a local folder; None for a hub id.

    Args:
        model: what the user gave.
        wanted: what to give instead of a file, for the message.

    Raises:
        InputError: it is neither.
    """
    try:
        path = as_path(model)
    except (ModuleNotFoundError, ValueError) as error:
        raise InputError(f"{model}: {error}") from error
    if path.is_dir():
        return path
    if path.is_file():
        raise InputError(f"{model}: is a file; give {wanted}")
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        return None
    raise InputError(f"{model}: no such folder")
