"""Files of strangers, and files of ours: paths that stay inside, lines of JSON, atomic writes."""

from __future__ import annotations

import glob
import json
import os
import re
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mmalign.data.schema import RowError
from mmalign.types import InputError

MAX_LINE_BYTES = 16 * 2**20
UTF8_BOM = b"\xef\xbb\xbf"
_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


def resolve_inside(root: Path, name: object) -> Path:
    """Join a name found in data to its root folder, without opening anything.

    Refused are absolute paths, drives, UNC paths, URLs, `..`, and links (of the file or of a folder
    on the way) that lead out of the root.

    Raises:
        RowError: if the name is refused, or there is no such regular file.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise RowError(f"{str(name)[:80]!r} is not a file name")
    unified = name.replace("\\", "/")
    if unified.startswith("/") or re.match(r"[A-Za-z]:", unified) or "://" in unified:
        raise RowError(f"{name!r} is absolute: names must be relative to {root}")
    if ".." in unified.split("/"):
        raise RowError(f"{name!r} leaves {root}: '..' is not allowed")
    return check_inside(root, root / name)


def check_inside(root: Path, path: Path) -> Path:
    """Check that a path, with its links followed, is a regular file inside the root.

    Raises:
        RowError: if it is outside, missing, or a folder, pipe or device.
    """
    try:
        real = path.resolve()
        inside = real.is_relative_to(root.resolve())
        regular = inside and real.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise RowError(f"{str(path)[:200]!r} cannot be looked up: {error}") from error
    if not inside:
        raise RowError(f"{path} is a link out of {root}: copy the file, or name it itself")
    if not regular:
        exists = real.exists()
        raise RowError(f"{path} {'is not a regular file' if exists else 'does not exist'}")
    return real


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """Read a file of JSON objects, one per line, with line numbers; blank lines are left out.

    A line that is broken comes as the `RowError` that says why. A UTF-8 byte order mark is skipped.

    Raises:
        InputError: if the file cannot be read or is UTF-16.
    """
    with reading(path), path.open("rb") as stream:
        check_encoding(path, stream.peek(4)[:4])
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(UTF8_BOM)
            if line.strip():
                yield number, _parse(line)
            if len(line) > MAX_LINE_BYTES:
                return


def read_text(path: Path) -> str:
    """Read a UTF-8 text file, with or without a byte order mark.

    Raises:
        InputError: if it cannot be read, or is UTF-16 or another encoding.
    """
    with reading(path):
        data = path.read_bytes()
    check_encoding(path, data[:4])
    try:
        return data.removeprefix(UTF8_BOM).decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path} line {line} is not UTF-8: save the file as UTF-8") from error


def read_lines(path: Path) -> list[str]:
    """Read the lines of a UTF-8 text file without their ends and without empty ones at its end.

    Raises:
        InputError: if it cannot be read, or is UTF-16 or another encoding.
    """
    text = read_text(path).replace("\r\n", "\n").rstrip()
    return text.split("\n") if text else []


def check_encoding(path: Path, head: bytes) -> None:
    """Refuse UTF-16, told by its byte order mark or by the zero bytes it has.

    Raises:
        InputError: saying what to do.
    """
    if head.startswith(UTF16_BOMS) or b"\0" in head:
        raise InputError(f"{path} is UTF-16 or binary, not UTF-8 text: save it as UTF-8")


def is_shards(images: str | None) -> bool:
    """Tell whether an option names webdataset shards: .tar files, or a folder of them."""
    if not images:
        return False
    path = Path(images).expanduser()
    if path.suffix == ".tar":
        return True
    return path.is_dir() and any(item.suffix == ".tar" for item in path.iterdir())


def list_shards(images: str) -> list[Path]:
    """List the shards that an option names, sorted.

    Raises:
        InputError: there are none, or two have the same name.
    """
    path = Path(images).expanduser()
    found = matching_files(path / "*.tar" if path.is_dir() else path)
    if not found:
        raise InputError(f"images: no shard matches {images}")
    twice = [name for name, count in Counter(s.name for s in found).items() if count > 1]
    if twice:
        raise InputError(f"images: two shards have the name {twice[0]}")
    return found


def matching_files(pattern: Path) -> list[Path]:
    """List the files of a pattern, sorted: `train-*.tar`, `{000..010}.tar`, `{train,val}.tar`.

    Raises:
        InputError: if one number or name in braces has no file, or a match is a link out of the
            pattern's folder.
    """
    patterns = _braces(str(pattern))
    matches = [glob.glob(text) for text in patterns]
    if len(patterns) > 1 and not all(matches):
        raise InputError(f"no file matches {patterns[matches.index([])]}")
    found = sorted({Path(name) for names in matches for name in names})
    for path in found:
        try:
            check_inside(path.parent, path)
        except RowError as error:
            raise InputError(str(error)) from error
    return found


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary file beside `path` that takes its place when the block succeeds.

    Raises:
        InputError: if it cannot be written: disk full, read-only folder.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def clear_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed writes from a folder that nobody else writes into."""
    for path in folder.rglob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            with suppress(OSError):
                path.unlink()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically.

    Raises:
        InputError: if it cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines, atomically.

    Raises:
        InputError: if the file cannot be written.
    """
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    write_bytes(path, "".join(lines).encode())


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into one line that names the file.

    Raises:
        InputError: naming the file and the reason.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into one line that names the file.

    Raises:
        InputError: naming the file and the reason.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def _braces(pattern: str) -> list[str]:
    """Write out `{000..010}` and `{train,val}`, as shells and webdataset do; `{a}` stays."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    before, after = pattern[: match.start()], pattern[match.end() :]
    first, last, names = match.groups()
    if names is not None:
        words = names.split(",")
    else:
        words = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    return [text for word in words for text in _braces(f"{before}{word}{after}")]


def _parse(line: bytes) -> dict[str, Any] | RowError:
    if len(line) > MAX_LINE_BYTES:
        return RowError(f"the line has more than {MAX_LINE_BYTES} bytes")
    try:
        record = json.loads(line.decode().strip())
    except UnicodeDecodeError:
        return RowError("the line is not UTF-8")
    except json.JSONDecodeError as error:
        return RowError(f"the line is not JSON, from column {error.colno}: {error.msg}")
    except (ValueError, RecursionError) as error:
        return RowError(f"the line is not usable JSON: {str(error)[:80]}")
    if not isinstance(record, dict):
        return RowError(f"the line is a JSON {type(record).__name__}, not an object")
    return record
