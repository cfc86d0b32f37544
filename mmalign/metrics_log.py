"""The local metrics log, `metrics.jsonl`: one JSON object per logged step, always on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO

from mmalign.types import InputError


class MetricsLog:
    """Append-only log that a resumed run continues bit for bit.

    Lines hold no wall time, so the log of an interrupted and resumed run equals that of an
    uninterrupted one. Non-finite numbers are written as null, which JSON can hold.
    """

    def __init__(self, path: Path, *, keep_until: int) -> None:
        """Open the log and drop every line after step `keep_until` (0 starts an empty log).

        Raises:
            InputError: the file cannot be written.
        """
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = _lines_until(path, keep_until)
            temporary = path.with_name(f".tmp-{path.name}")
            temporary.unlink(missing_ok=True)  # a link in its place would be written through
            temporary.write_bytes(kept)
            os.replace(temporary, path)
            self._file: IO[bytes] = path.open("ab", buffering=0)
        except OSError as error:
            raise self._error(error) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line; it has reached the operating system on return.

        Raises:
            InputError: the disk is full.
        """
        text = json.dumps({"step": step, **{key: _number(v) for key, v in values.items()}})
        line = text.encode() + b"\n"
        try:
            while line:  # a disk that fills up takes the beginning first, without an error
                line = line[self._file.write(line) :]
        except OSError as error:
            raise self._error(error) from error

    def sync(self) -> None:
        """Wait until every line is on disk.

        Raises:
            InputError: the disk is full.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._error(error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> MetricsLog:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file."""
        self.close()

    def _error(self, error: OSError) -> InputError:
        return InputError(f"{self.path}: cannot write metrics ({error})")


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """Read every whole line of a metrics log."""
    return [json.loads(line) for line in _lines_until(path, None).splitlines()]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _lines_until(path: Path, last_step: int | None) -> bytes:
    """Keep the leading lines up to `last_step`; a line cut short by a kill ends the log."""
    if last_step == 0 or not path.is_file():
        return b""
    kept = bytearray()
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            step = int(json.loads(line)["step"])
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
            break
        if not line.endswith(b"\n") or (last_step is not None and step > last_step):
            break
        kept += line
    return bytes(kept)
