"""Work that goes through webdataset shards, in memory that does not grow with their number.

Each process takes its own shards and talks to no other. A shard's results are written, then a
record of it, so that a further run does only what has no record yet.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mmalign.config import OnBadRow
from mmalign.data.files import read_text, write_bytes
from mmalign.data.images import decode, to_tensor
from mmalign.data.schema import BadRow, RowError
from mmalign.data.webdataset import ShardImage, stream_images
from mmalign.processes import launched
from mmalign.types import InputError

SETTINGS = "settings.json"
RECORDS = "records"
Record = dict[str, Any]


class Share(NamedTuple):
    """Which shards are this process's: its number and the number of processes."""

    process: int
    processes: int

    @classmethod
    def of(cls, shard: int, num_shards: int) -> Share:
        """Take the options, or the launcher's numbers where they leave it open."""
        return cls(*launched()) if num_shards == 1 else cls(shard, num_shards)


def go_through(
    shards: Sequence[Path],
    output: Path,
    settings: Record,
    share: Share,
    work: Callable[[Path, Callable[[int], object]], Record],
) -> list[Record] | None:
    """Do this process's shards that are not done.

    Args:
        shards: all shards.
        output: folder of the results.
        settings: what the results depend on.
        share: which shards are this process's.
        work: does a shard, saying how many rows it has gone on by, and returns its record.

    Returns:
        The records of all shards, None as long as other processes have not done theirs.

    Raises:
        InputError: the folder has results of other settings, or as `work`.
    """
    _check_settings(output, settings)
    mine = shards[share.process :: share.processes]
    waiting = [shard for shard in mine if _record(output, shard) is None]
    title = f"{len(waiting)} of {len(mine)} shards"
    with tqdm(desc=title, unit="row", disable=share.process > 0) as bar:
        for shard in waiting:
            record = work(shard, bar.update)
            file = output / RECORDS / f"{shard.stem}.json"
            write_bytes(file, json.dumps(record, allow_nan=False).encode())
    records = [_record(output, shard) for shard in shards]
    known = [record for record in records if record is not None]
    return known if len(known) == len(records) else None


def batches(
    shard: Path, *, size: int, max_pixels: int, on_bad_row: OnBadRow, bad: list[BadRow]
) -> Iterator[tuple[list[ShardImage], Tensor]]:
    """Decode the images of a shard, neighbors of the same size together.

    Args:
        shard: the shard.
        size: images (B, 3, H, W) at a time.
        max_pixels: images with more are bad.
        on_bad_row: what to do about bad rows.
        bad: receives them.

    Raises:
        InputError: the first bad row under `stop`, or a shard that cannot be read.
    """
    rows: list[ShardImage] = []
    images: list[Tensor] = []
    for row in stream_images(shard):
        decoded = _decoded(row, max_pixels)
        if isinstance(decoded, BadRow):
            if on_bad_row == "stop":
                raise InputError(str(decoded))
            bad.append(decoded)
            continue
        assert isinstance(row, ShardImage)
        if rows and (len(rows) == size or decoded.shape != images[0].shape):
            yield rows, torch.stack(images)
            rows, images = [], []
        rows.append(row)
        images.append(decoded)
    if rows:
        yield rows, torch.stack(images)


def _decoded(row: ShardImage | BadRow, max_pixels: int) -> Tensor | BadRow:
    if isinstance(row, BadRow):
        return row
    try:
        return to_tensor(decode(row.image, max_pixels))
    except RowError as error:
        return BadRow(row.image.where, str(error))


def _record(output: Path, shard: Path) -> Record | None:
    file = output / RECORDS / f"{shard.stem}.json"
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_bytes())
    except ValueError as error:
        raise InputError(f"{file} is damaged: remove it, and its shard is done again") from error
    return record if isinstance(record, dict) else None


def _check_settings(output: Path, settings: Record) -> None:
    """Refuse to mix results of different settings in one folder."""
    file = output / SETTINGS
    text = json.dumps(settings, sort_keys=True, default=str)
    if not file.is_file():
        write_bytes(file, text.encode())
        return
    try:
        before = json.loads(read_text(file))
    except ValueError as error:
        raise InputError(f"{file} is damaged: choose another output folder") from error
    now = json.loads(text)
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            raise InputError(
                f"{output} has results of {name} {before.get(name)!r}, not {now.get(name)!r}:"
                " choose another output folder"
            )
