"""Pairs in parquet files: canonical columns, or those of Pick-a-Pic."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mmalign.data.files import resolve_inside
from mmalign.data.schema import (
    CHOSEN,
    OPTIONAL_COLUMNS,
    REJECTED,
    REQUIRED_COLUMNS,
    BadRow,
    Row,
    RowError,
    Tie,
    require,
)
from mmalign.types import ImageRef, InputError

Layout = Literal["parquet", "pickapic"]
PICKAPIC_COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
PICKAPIC_OPTIONAL = ("has_label", "source", "pair_id")
ROWS_AT_A_TIME = 16
UNREADABLE: tuple[type[Exception], ...] = (
    OSError,
    pa.ArrowException,
    UnicodeDecodeError,  # names of columns
)


class Location(NamedTuple):
    """Where a pair is: number of the file, row in it from 0, and which image columns."""

    file: int
    row: int
    chosen: str
    rejected: str


class ParquetPairs:
    """Parquet files, read a few rows at a time.

    An image cell holds encoded bytes, a `{bytes, path}` struct as the datasets library writes it,
    or a path relative to the file's folder. Rows are found again by reading on from the last one,
    so going through in order is fast; jumping about costs half a row group per row.
    """

    def __init__(self, files: Sequence[Path], layout: Layout) -> None:
        """Name the files and their layout."""
        self.files = list(files)
        self.layout = layout
        self._cursor: RowCursor | None = None

    def rows(self) -> Iterator[Row | Tie | BadRow]:
        """List the rows of all files.

        Raises:
            InputError: if a column is missing.
        """
        for number, file in enumerate(self.files):
            try:
                for row, record in enumerate(self._records(file)):
                    yield self._row(number, row, record)
            except UNREADABLE as error:
                yield BadRow(str(file), f"not a readable parquet file: {first_line(error)}")

    def images(self, key: object) -> tuple[ImageRef, ImageRef]:
        """Read the two images of a row again.

        Raises:
            InputError: if the file changed meanwhile.
        """
        if not isinstance(key, Location):
            raise TypeError(f"not a location in parquet files: {key!r}")
        file = self.files[key.file]
        columns = _image_columns(self.layout)
        if self._cursor is None or not self._cursor.can_reach(file, key.row):
            self._cursor = RowCursor(file, columns, key.row)
        record = self._cursor.read(key.row)
        where = f"{file} row {key.row + 1}"
        try:
            chosen, rejected = (
                image_cell(record[column], file.parent, f"{where}, {column}")
                for column in (key.chosen, key.rejected)
            )
        except RowError as error:
            raise InputError(f"{where}: {error}") from error
        return chosen, rejected

    def __getstate__(self) -> dict[str, object]:
        """Leave the open file behind when sent to another process."""
        return {**self.__dict__, "_cursor": None}

    def _records(self, file: Path) -> Iterator[dict[str, Any]]:
        with open_parquet(file) as parquet:
            names = parquet.schema_arrow.names
            required, optional = _columns(self.layout)
            try:
                require(names, required)
            except RowError as error:
                raise InputError(f"{file}: column {error}") from error
            columns = [name for name in names if name in (*required, *optional)]
            yield from iterate_rows(parquet, columns, range(parquet.num_row_groups))

    def _row(self, number: int, row: int, record: Mapping[str, object]) -> Row | Tie | BadRow:
        file = self.files[number]
        where = f"{file} row {row + 1}"
        fields: Mapping[str, object] = record
        sides: tuple[str, str] | None = (CHOSEN, REJECTED)
        try:
            if self.layout == "pickapic":
                fields = {**record, "prompt": record["caption"]}
                sides = _winner(record)
            if sides is None:
                return Tie(where)
            chosen, rejected = (
                image_cell(record[side], file.parent, f"{where}, {side}") for side in sides
            )
        except RowError as error:
            return BadRow(where, str(error))
        return Row(where, fields, chosen, rejected, Location(number, row, *sides))


class RowCursor:
    """Reads some columns of one file forward from a row, in one process."""

    def __init__(self, file: Path, columns: Sequence[str], row: int) -> None:
        """Open a file at a row, counted from 0."""
        self.file, self.pid = file, os.getpid()
        self._parquet = open_parquet(file)
        metadata = self._parquet.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._starts: list[int] = list(accumulate(sizes, initial=0))[:-1]
        group = bisect_right(self._starts, row) - 1
        self._records = iterate_rows(self._parquet, columns, range(group, len(sizes)))
        self._next = self._starts[group]
        self._last: tuple[int, dict[str, Any]] | None = None

    def can_reach(self, file: Path, row: int) -> bool:
        """Tell whether reading on from here is the shortest way to a row."""
        if self.file != file or self.pid != os.getpid():
            return False
        if self._last is not None and self._last[0] == row:
            return True
        start = self._starts[bisect_right(self._starts, row) - 1]
        return row >= self._next and start <= self._next + ROWS_AT_A_TIME

    def read(self, row: int) -> dict[str, Any]:
        """Read a row that `can_reach` said yes to.

        Raises:
            InputError: if the file has no such row any more.
        """
        if self._last is not None and self._last[0] == row:
            return self._last[1]
        for record in self._records:
            self._next += 1
            if self._next == row + 1:
                self._last = (row, record)
                return record
        raise InputError(f"{self.file} has no row {row + 1}: it changed while it was being read")


def has_pickapic_columns(file: Path) -> bool:
    """Tell whether a parquet file has the image columns of Pick-a-Pic.

    Raises:
        InputError: if it is no parquet file.
    """
    try:
        with open_parquet(file) as parquet:
            return {"jpg_0", "jpg_1"} <= set(parquet.schema_arrow.names)
    except UNREADABLE as error:
        message = f"{file} is not a readable parquet file: {first_line(error)}"
        raise InputError(message) from error


def open_parquet(file: Path) -> Any:
    """Open a file, which then reads as little of it as a row needs."""
    # Mapped and unbuffered, so that of a huge row group only some pages are ever in memory.
    return pq.ParquetFile(file, memory_map=True, pre_buffer=False)


def iterate_rows(parquet: Any, columns: Sequence[str], groups: range) -> Iterator[dict[str, Any]]:
    """Yield the rows of some row groups, a few at a time."""
    if not len(groups):
        return
    batches = parquet.iter_batches(
        batch_size=ROWS_AT_A_TIME, row_groups=list(groups), columns=list(columns), use_threads=False
    )
    for batch in batches:
        for index in range(batch.num_rows):
            yield {
                name: _value(name, column[index])
                for name, column in zip(batch.schema.names, batch.columns, strict=True)
            }


def _value(column: str, cell: Any) -> Any:
    try:
        return cell.as_py()
    except (ValueError, OverflowError, LookupError) as error:
        # Text that is not UTF-8, times that Python does not have.
        problem = f"a value of column {column!r}: {first_line(error)}"
        raise pa.ArrowInvalid(problem) from error


def _columns(layout: Layout) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if layout == "pickapic":
        return PICKAPIC_COLUMNS, PICKAPIC_OPTIONAL
    return REQUIRED_COLUMNS, OPTIONAL_COLUMNS


def _image_columns(layout: Layout) -> tuple[str, str]:
    return ("jpg_0", "jpg_1") if layout == "pickapic" else (CHOSEN, REJECTED)


def _winner(record: Mapping[str, object]) -> tuple[str, str] | None:
    """Name the columns of the preferred and the other image; None without a preference.

    Labels are 1 and 0, or 0.5 each for a tie; `has_label` false means that nobody chose.
    """
    if record.get("has_label") in (False, 0):
        return None
    labels: list[float] = []
    for name in ("label_0", "label_1"):
        value = record[name]
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise RowError(f"{name} is {value!r}, not a number from 0 to 1")
        labels.append(value)
    if labels[0] == labels[1]:
        return None
    return ("jpg_0", "jpg_1") if labels[0] > labels[1] else ("jpg_1", "jpg_0")


def image_cell(cell: object, root: Path, where: str) -> ImageRef:
    """Turn what stands for an image in a row into a reference: bytes, struct, or relative path.

    Raises:
        RowError: if it is none of these, or a path that leaves `root`.
    """
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if isinstance(cell, bytes):
        return ImageRef(cell, where)
    if isinstance(cell, str):
        return ImageRef(resolve_inside(root, cell), f"{where}: {cell}")
    if cell is None:
        raise RowError(f"the image of {where.rpartition(', ')[2]} is missing")
    raise RowError(f"an image cell is a {type(cell).__name__}: use bytes or a relative path")


def first_line(error: Exception) -> str:
    """Shorten what a library says to one line."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]
