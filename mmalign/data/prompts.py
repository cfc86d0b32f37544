"""Files of prompts."""

from __future__ import annotations

from pathlib import Path

from mmalign.config import as_path
from mmalign.data.files import read_jsonl, read_lines
from mmalign.data.schema import RowError, read_prompt
from mmalign.types import InputError


def read_prompts(path: Path | str, limit: int | None = None) -> list[str]:
    """Read prompts, in order: a `.jsonl` file with the key `prompt`, else one prompt per line.

    Line ends and a byte order mark are dropped, blanks around a prompt too; empty lines at the end
    of the file do not count.

    Args:
        path: the file; `~` and `pkg://package/file` are resolved.
        limit: read only so many.

    Raises:
        InputError: naming the line, if a prompt is empty, a line is broken, or the file cannot be
            read or is not UTF-8.
    """
    file = as_path(path)
    if not file.is_file():
        raise InputError(f"prompt file {file} does not exist")
    if limit is not None and limit < 1:
        raise InputError(f"the number of prompts must be at least 1, got {limit}")
    prompts: list[str] = []
    lines = read_jsonl(file) if file.suffix == ".jsonl" else _text_lines(file)
    for number, record in lines:
        if limit is not None and len(prompts) == limit:
            break
        try:
            if isinstance(record, RowError):
                raise record
            prompts.append(read_prompt(record).strip())
        except RowError as error:
            raise InputError(f"{file} line {number}: {error}") from error
    if not prompts:
        raise InputError(f"{file} has no prompts")
    return prompts


def _text_lines(file: Path) -> list[tuple[int, dict[str, str] | RowError]]:
    return [(number, {"prompt": line}) for number, line in enumerate(read_lines(file), start=1)]
