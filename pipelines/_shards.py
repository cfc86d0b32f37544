"""Work that goes through webdataset shards, in memory that does not grow with their number.

Each process takes its own shards and talks to no other. A shard's results are written, then a
record of it, so that a further run does only what has no record yet. The record says of which
shard it is: by path, size and time, and by a hash of the contents where these differ, so that a
shard that was moved is known again and another one of the same name is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mmalign.config import OnBadRow
from mmalign.data.files import read_text, reading, write_bytes
from mmalign.data.images import decode, to_tensor
from mmalign.data.schema import BadRow, RowError
from mmalign.data.webdataset import ShardImage, stream_images
from mmalign.processes import launched
from mmalign.types import InputError

SETTINGS = "settings.json"
RECORDS = "records"
LAYOUT = 2
"""Of folders of results; the first said neither of which shards nor of which reward they are."""
SHARD = "shard"
Record = dict[str, Any]


class Share(NamedTuple):
    """Which shards are this process's: its number and the number of processes."""

    process: int
    processes: int

    @classmethod
    def of(cls, shard: int, num_shards: int) -> Share:
        """Take the options, or the launcher's numbers where they leave it open."""
        return cls(*launched()) if num_shards == 1 else cls(shard, num_shards)

    def report(self, more: str) -> None:
        """Say that this process is done before others; `more` is what else to say of it."""
        done = f"process {self.process} of {self.processes} is done{more}"
        tqdm.write(f"{done}; others are not yet")


class Seen(NamedTuple):
    """What tells a shard from another of its name; `hash` is that of all its bytes."""

    path: str
    size: int
    mtime_ns: int
    hash: str

    @classmethod
    def of(cls, shard: Path) -> Seen:
        """Read a shard.

        Raises:
            InputError: if it cannot be read, or changes meanwhile.
        """
        before = _state(shard)
        with reading(shard), shard.open("rb") as stream:
            digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16))
        found = cls(*before, digest.hexdigest())
        found.check(shard)
        return found

    def check(self, shard: Path) -> None:
        """Refuse a shard that was written to since.

        Raises:
            InputError: if it was, or is gone.
        """
        if _state(shard) != self[:3]:
            raise InputError(f"{shard} was changed while it was read: run again")


def go_through(
    shards: Sequence[Path],
    output: Path,
    settings: Record,
    share: Share,
    work: Callable[[Path, Seen, Callable[[int], object]], Record],
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
        InputError: the folder has results of other settings or shards, or as `work`.
    """
    _check_settings(output, {"layout": LAYOUT, **settings})
    mine = shards[share.process :: share.processes]
    waiting = [shard for shard in mine if _record(output, shard) is None]
    title = f"{len(waiting)} of {len(mine)} shards"
    with tqdm(desc=title, unit="row", disable=share.process > 0) as bar:
        for shard in waiting:
            seen = Seen.of(shard)
            record = work(shard, seen, bar.update)
            seen.check(shard)
            _write_record(output, shard, record, seen)
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


def _record_file(output: Path, shard: Path) -> Path:
    return output / RECORDS / f"{shard.stem}.json"


def _record(output: Path, shard: Path) -> Record | None:
    """Read what is known of a shard; None if it has not been done."""
    file = _record_file(output, shard)
    if not file.is_file():
        return None
    try:
        record = json.loads(read_text(file))
        seen = Seen(**record[SHARD])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file} is damaged: remove it, and its shard is done again") from error
    state = _state(shard)
    if state != seen[:3]:
        if state[1] != seen.size or Seen.of(shard).hash != seen.hash:
            raise InputError(
                f"{output} has results of {seen.path} as it was then, {shard} is not the same:"
                f" choose another output folder, or remove {file}"
            )
        _write_record(output, shard, record, Seen(*state, seen.hash))  # the same, in a new place
    return cast(Record, record)


def _write_record(output: Path, shard: Path, record: Record, seen: Seen) -> None:
    text = json.dumps({**record, SHARD: seen._asdict()}, allow_nan=False)
    write_bytes(_record_file(output, shard), text.encode())


def _state(shard: Path) -> tuple[str, int, int]:
    with reading(shard):
        state = shard.stat()
    return str(shard.resolve()), state.st_size, state.st_mtime_ns


def _check_settings(output: Path, settings: Record) -> None:
    """Refuse to mix results of different settings in one folder."""
    file = output / SETTINGS
    text = json.dumps(settings, default=str)
    if not file.is_file():
        write_bytes(file, text.encode())
        return
    try:
        before = json.loads(read_text(file))
    except ValueError as error:
        raise InputError(f"{file} is damaged: choose another output folder") from error
    if not isinstance(before, dict) or before.get("layout") != LAYOUT:
        raise InputError(
            f"{output} has results of another version of mmalign, which do not say what they are"
            " of: choose another output folder"
        )
    difference = _difference(before, json.loads(text))
    if difference is not None:
        name, old, new = difference
        raise InputError(
            f"{output} has results of {name} {old!r}, not {new!r}: choose another output folder"
        )


def _difference(
    before: Mapping[str, Any], now: Mapping[str, Any], place: str = ""
) -> tuple[str, object, object] | None:
    """Find the first setting that differs: its name, and both values."""
    for name in dict.fromkeys([*now, *before]):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if not isinstance(old, dict) or not isinstance(new, dict):
            return f"{place}{name}", old, new
        if old.keys() != new.keys():
            return f"{place}{name}", list(old), list(new)
        return _difference(old, new, f"{place}{name} ")
    return None
