"""The table of a shard's scores: names, prompts, and a column for each reward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

FILE_NAME = "file_name"
PROMPT = "prompt"
ROW_GROUP = 8192


class ShardTable:
    """A parquet file written in row groups, so that a shard of any size takes little memory."""

    def __init__(self, file: Path, scores: Iterable[str]) -> None:
        """Begin the file, with a column of text for names and prompts, and one for each score."""
        text = [(FILE_NAME, pa.string()), (PROMPT, pa.string())]
        self._schema = pa.schema([*text, *((name, pa.float64()) for name in scores)])
        self._writer = pq.ParquetWriter(file, self._schema)
        self._columns: dict[str, list[Any]] = {name: [] for name in self._schema.names}

    def add(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Append rows, given by column; a name that is not Unicode is written with escapes."""
        for name, values in columns.items():
            self._columns[name] += map(escaped, values) if name == FILE_NAME else values
        if len(self._columns[PROMPT]) >= ROW_GROUP:
            self._flush()

    def __enter__(self) -> ShardTable:
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        self._writer.write_table(pa.table(self._columns, schema=self._schema))
        self._columns = {name: [] for name in self._columns}


def escaped(value: str) -> str:
    """Escape what UTF-8 cannot hold, as names in tar files may have."""
    return value.encode("utf-8", "backslashreplace").decode()
