"""Answer files and label files of strangers, as rows that know where they are.

The official scripts name JSON lines `.json` and the other way round, so contents decide: a list
of objects, or one object per line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mmalign.data.files import read_text
from mmalign.types import InputError

_COCO_FILE = re.compile(r"(?:.*/)?(?:COCO_[a-z]+\d+_)?0*(\d+)(?:\.[A-Za-z]{3,4})?")
SHOWN_IDS = 3
OnMissing = Literal["stop", "skip"]
"""What is done when an id has no answer."""


class Record(NamedTuple):
    """One row: its place (file with line or entry, from 1) and its fields."""

    where: str
    fields: Mapping[str, Any]


def read_json(path: Path, *, unique_keys: bool = False) -> Any:
    """Read a file that is one JSON value.

    Args:
        path: file.
        unique_keys: refuse objects that name a key twice, where JSON would take the last.

    Raises:
        InputError: naming file, line and column, if it is not; or the key that comes twice.
    """
    text = read_text(path)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{path}: {twice[:60]!r} comes twice in one object")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique if unique_keys else None)
    except InputError:
        raise
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise InputError(f"{path} {place} is not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not usable JSON: {str(error)[:80]}") from error


def read_records(path: Path) -> list[Record]:
    """Read a JSON list of objects, or JSON lines; blank lines are left out.

    Raises:
        InputError: naming file and row, for anything else, or for a file without rows.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        content = read_json(path)
        rows = [(f"{path} entry {i}", row) for i, row in enumerate(content, 1)]
    else:
        lines = enumerate(text.split("\n"), 1)
        rows = [(f"{path} line {i}", _line(path, i, line)) for i, line in lines if line.strip()]
    if not rows:
        raise InputError(f"{path} is empty: expected one JSON object per answer")
    for where, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{where} is a JSON {_kind(row)}, not an object")
    return [Record(where, row) for where, row in rows]


def text_field(record: Record, *names: str) -> str:
    """Take the text of the first of `names` that the row has.

    Raises:
        InputError: naming the row, if it has none of them or it is not text.
    """
    name = _present(record, names)
    value = record.fields[name]
    if not isinstance(value, str):
        raise InputError(f"{record.where}: {name!r} is {_kind(value)}, not text")
    return clean(value)


def id_field(record: Record, *names: str) -> str:
    """Take an id, a whole number or text, as text.

    Raises:
        InputError: naming the row, if it has none or one of another kind.
    """
    name = _present(record, names)
    value = record.fields[name]
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise InputError(f"{record.where}: {name!r} is {_kind(value)}, not a number or text")
    return clean(str(value)[:200])


def clean(text: str) -> str:
    """Replace halves of surrogate pairs, which JSON can hold and no file can."""
    return text.encode("utf-8", "replace").decode()


def image_id(value: str) -> str:
    """Bring ids to one form: `COCO_val2014_000000000042.jpg`, `000042` and `42` are one image."""
    match = _COCO_FILE.fullmatch(value.strip())
    return match[1] if match else value.strip()


def without_doubles(records: Iterable[tuple[str, Record]]) -> dict[str, Record]:
    """Index rows by id.

    Raises:
        InputError: naming both rows, if an id comes twice.
    """
    found: dict[str, Record] = {}
    for key, record in records:
        if key in found:
            raise InputError(f"{record.where}: id {key} comes again, first at {found[key].where}")
        found[key] = record
    return found


def check_known(found: Mapping[str, Record], known: Iterable[str], labels: str) -> None:
    """Refuse answers to what the labels do not have.

    Raises:
        InputError: naming the first such row.
    """
    wanted = set(known)
    for key, record in found.items():
        if key not in wanted:
            raise InputError(f"{record.where}: id {key} is not in {labels}")


def check_complete(
    path: Path, found: Mapping[str, Record], wanted: Sequence[str], policy: OnMissing
) -> list[str]:
    """List the ids that have no answer.

    Returns:
        Warnings: nothing, or under `skip` one line that counts them.

    Raises:
        InputError: naming the first of them, under `stop`.
    """
    missing = [key for key in wanted if key not in found]
    if not missing:
        return []
    shown = ", ".join(missing[:SHOWN_IDS]) + (", ..." if len(missing) > SHOWN_IDS else "")
    if policy == "stop":
        raise InputError(
            f"{path}: no answer for {len(missing)} of {len(wanted)} ids ({shown}); "
            "--on_missing skip scores the others"
        )
    return [f"{len(missing)} of {len(wanted)} ids have no answer and were left out: {shown}"]


def _line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} line {number} is not JSON: {error.msg} at column {error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} line {number} is not usable JSON: {str(error)[:80]}") from error


def _present(record: Record, names: Sequence[str]) -> str:
    for name in names:
        if name in record.fields:
            return name
    wanted = " or ".join(repr(name) for name in names)
    keys = (" ".join(str(key).split()) for key in list(record.fields)[:8])
    has = ", ".join(keys) or "none"
    raise InputError(f"{record.where}: no {wanted}; its keys are {has}")


def _kind(value: object) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "boolean", type(None): "null"}
    if value == "":
        return "empty"
    return names.get(type(value), "number")
