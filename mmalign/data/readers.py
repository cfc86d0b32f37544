"""Preference pairs from every format: one pass that checks each row, then lazy access."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import overload

from tqdm.auto import tqdm

from mmalign.config import PairsConfig
from mmalign.data.detect import open_source
from mmalign.data.images import check_header, decode, hash_image
from mmalign.data.schema import (
    BadRow,
    PairInfo,
    PairSource,
    Row,
    RowError,
    Tie,
    content_id,
    row_to_info,
)
from mmalign.types import ImageRef, InputError, PreferencePair

logger = logging.getLogger(__name__)
BAR_DELAY = 1.0
LISTED = 5

__all__ = ["BadRow", "LazyPairs", "PairTable", "Scan", "describe", "read_pairs", "scan"]


class LazyPairs(Sequence[PreferencePair]):
    """Pairs whose images are fetched from their source when a pair is asked for."""

    def __init__(self, source: PairSource, infos: list[PairInfo], keys: list[object]) -> None:
        """Hold what is known of each pair, and the key of its images."""
        self.source, self.infos, self._keys = source, infos, keys

    def __len__(self) -> int:
        """Count the pairs."""
        return len(self.infos)

    @overload
    def __getitem__(self, index: int) -> PreferencePair: ...

    @overload
    def __getitem__(self, index: slice) -> LazyPairs: ...

    def __getitem__(self, index: int | slice) -> PreferencePair | LazyPairs:
        """Fetch one pair, or select several without fetching them.

        Raises:
            InputError: if the images cannot be found any more.
        """
        if isinstance(index, slice):
            return LazyPairs(self.source, self.infos[index], self._keys[index])
        info = self.infos[index]
        chosen, rejected = self.source.images(self._keys[index])
        return PreferencePair(
            pair_id=info.pair_id,
            prompt=info.prompt,
            chosen=chosen,
            rejected=rejected,
            score_chosen=info.score_chosen,
            score_rejected=info.score_rejected,
            margin=info.margin,
            source=info.source,
        )


@dataclass
class PairTable:
    """Usable pairs, and what was left out."""

    pairs: Sequence[PreferencePair]
    bad_rows: list[BadRow] = field(default_factory=list)
    ties: int = 0


@dataclass(kw_only=True)
class RowCounts:
    """What one pass over a source came across; `bad_rows` includes the duplicates."""

    bad_rows: list[BadRow] = field(default_factory=list)
    rows: int = 0
    ties: int = 0
    duplicates: int = 0

    def refuse(self, row: BadRow, *, stop: bool) -> None:
        """List a bad row.

        Raises:
            InputError: under `stop`.
        """
        if stop:
            raise InputError(f"{row}; on_bad_row: skip leaves such rows out")
        self.bad_rows.append(row)

    def check(self, path: str) -> None:
        """Name some of the bad rows in the log.

        Raises:
            InputError: there were no rows at `path`.
        """
        if not self.rows:
            raise InputError(f"{path} has no rows")
        if self.bad_rows:
            some = "; ".join(map(str, self.bad_rows[:LISTED]))
            logger.warning("%d bad rows skipped, among them: %s", len(self.bad_rows), some)


@dataclass
class Scan(RowCounts):
    """The pairs that one pass over a source found, and what else was there."""

    pairs: LazyPairs


def read_pairs(config: PairsConfig) -> PairTable:
    """Read preference pairs of any format.

    Every image is hashed and its header checked, none decoded: one that is cut off in the middle
    shows later, or in `pairs validate`. Ties are dropped and counted.

    Raises:
        InputError: for the first bad row under `on_bad_row: stop`; or if nothing is found at the
            path, its format is unclear, or it has no rows.
    """
    check_limit(config.limit)
    found = scan(
        open_source(config.path, config.format),
        max_pixels=config.max_pixels,
        limit=config.limit,
        stop=config.on_bad_row == "stop",
    )
    found.check(config.path)
    return PairTable(found.pairs, found.bad_rows, found.ties)


def scan(
    source: PairSource,
    *,
    max_pixels: int,
    limit: int | None = None,
    stop: bool = False,
    full: bool = False,
) -> Scan:
    """Go through a source once and check every row.

    Args:
        source: where rows come from.
        max_pixels: larger images are bad.
        limit: end after so many good pairs.
        stop: raise at the first bad row instead of listing it.
        full: decode every image instead of reading its header only.

    Raises:
        InputError: for the first bad row under `stop`.
    """
    keys: list[object] = []
    found = Scan(LazyPairs(source, [], keys))
    seen: dict[str, str] = {}
    checked: PairInfo | Tie | BadRow
    for row in tqdm(source.rows(), desc="read pairs", unit="row", delay=BAR_DELAY):
        found.rows += 1
        if isinstance(row, Row):
            checked, duplicate = _check(row, seen, max_pixels, full)
            found.duplicates += duplicate
        else:
            checked = row
        if isinstance(checked, Tie):
            found.ties += 1
        elif isinstance(checked, BadRow):
            found.refuse(checked, stop=stop)
        elif isinstance(row, Row):
            found.pairs.infos.append(checked)
            keys.append(row.key)
            if len(keys) == limit:
                break
    return found


def check_limit(limit: int | None) -> None:
    """Refuse a limit that leaves no pair.

    Raises:
        InputError: it is below 1.
    """
    if limit is not None and limit < 1:
        raise InputError(f"pairs.limit must be at least 1, got {limit}")


def describe(pairs: Sequence[PreferencePair]) -> list[PairInfo]:
    """List everything about pairs but their images, which are hashed if need be.

    Raises:
        InputError: naming a pair whose image cannot be read, or that has texts instead.
    """
    if isinstance(pairs, LazyPairs):
        return pairs.infos
    return [_describe(pair) for pair in pairs]


def image_of(side: ImageRef | str, pair_id: str) -> ImageRef:
    """Return a pair's side as an image.

    Raises:
        InputError: if it is a text.
    """
    if isinstance(side, str):
        raise InputError(f"pair {pair_id} has texts, not images")
    return side


def _describe(pair: PreferencePair) -> PairInfo:
    refs = [image_of(side, pair.pair_id) for side in (pair.chosen, pair.rejected)]
    hashes = []
    for ref in refs:
        try:
            hashes.append(hash_image(ref))
        except RowError as error:
            raise InputError(f"{ref.where}: {error}") from error
    return PairInfo(
        pair_id=pair.pair_id,
        prompt=pair.prompt,
        score_chosen=pair.score_chosen,
        score_rejected=pair.score_rejected,
        margin=pair.margin,
        source=pair.source,
        chosen_hash=hashes[0],
        rejected_hash=hashes[1],
    )


def _check(
    row: Row, seen: dict[str, str], max_pixels: int, full: bool
) -> tuple[PairInfo | Tie | BadRow, bool]:
    """Check a row; the flag says whether it repeats an earlier one."""
    problems = []
    hashes: list[bytes] = []
    for side, ref in (("chosen", row.chosen), ("rejected", row.rejected)):
        try:
            hashes.append(hash_image(ref))
            (decode if full else check_header)(ref, max_pixels)
        except RowError as error:
            problems.append(f"{side}: {error}")
    info: PairInfo | None = None
    try:
        # A row with a bad image is still checked for what else is wrong with it.
        chosen, rejected = hashes if len(hashes) == 2 else (b"", b"")
        info = row_to_info(row.fields, chosen, rejected)
    except RowError as error:
        problems.append(str(error))
    if info is None and not problems:
        return Tie(row.where), False
    if len(hashes) == 2 and hashes[0] == hashes[1]:
        problems.append("chosen and rejected are the same image")
    if problems or info is None:
        return BadRow(row.where, "; ".join(problems)), False
    before = repeated(row.where, info, seen)
    if before is not None:
        return BadRow(row.where, before), True
    return info, False


def repeated(where: str, info: PairInfo, seen: dict[str, str]) -> str | None:
    """Say which earlier row a pair repeats, in content or in id; None for a new one."""
    content = content_id(info.prompt, info.chosen_hash, info.rejected_hash)
    earlier = seen.setdefault(content, where)
    if earlier != where:
        return f"the same pair as {earlier}"
    earlier = seen.setdefault(info.pair_id, where)
    if earlier != where:
        return f"pair_id {info.pair_id!r} is also that of {earlier}"
    return None
