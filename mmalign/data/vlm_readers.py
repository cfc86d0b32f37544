"""Preferences between answers: one pass that checks each row, then lazy access."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, overload

from tqdm.auto import tqdm

from mmalign.config import VlmPairsConfig
from mmalign.data.images import check_header, decode, hash_image
from mmalign.data.readers import BAR_DELAY, RowCounts, check_limit, repeated
from mmalign.data.schema import BadRow, PairInfo, RowError, content_hash, row_to_info
from mmalign.data.validate import ValidationReport
from mmalign.data.vlm_records import VlmRecord
from mmalign.data.vlm_source import VlmFiles, VlmRow, open_vlm_source
from mmalign.types import VlmPair


class _Known(NamedTuple):
    """Everything about a pair but its images."""

    info: PairInfo
    where: str
    record: VlmRecord
    key: object


class VlmPairs(Sequence[VlmPair]):
    """Pairs whose images are fetched from their files when a pair is asked for."""

    def __init__(self, source: VlmFiles, known: list[_Known]) -> None:
        """Hold what is known of each pair, and the key of its images."""
        self._source, self._known = source, known

    @property
    def infos(self) -> list[PairInfo]:
        """What is known of each pair besides texts and images."""
        return [known.info for known in self._known]

    def __len__(self) -> int:
        """Count the pairs."""
        return len(self._known)

    @overload
    def __getitem__(self, index: int) -> VlmPair: ...

    @overload
    def __getitem__(self, index: slice) -> VlmPairs: ...

    def __getitem__(self, index: int | slice) -> VlmPair | VlmPairs:
        """Fetch one pair, or select several without fetching them.

        Raises:
            InputError: if the images cannot be found any more.
        """
        if isinstance(index, slice):
            return VlmPairs(self._source, self._known[index])
        info, where, record, key = self._known[index]
        return VlmPair(
            pair_id=info.pair_id,
            prompt=info.prompt,
            chosen=record.chosen,
            rejected=record.rejected,
            images=self._source.images(key),
            score_chosen=info.score_chosen,
            score_rejected=info.score_rejected,
            margin=info.margin,
            source=info.source,
            revised=record.revised,
            where=where,
        )


@dataclass
class VlmPairTable:
    """Usable pairs, and what was left out."""

    pairs: VlmPairs
    bad_rows: list[BadRow] = field(default_factory=list)
    ties: int = 0


@dataclass
class VlmScan(RowCounts):
    """The pairs that one pass over a source found, and what else was there."""

    pairs: VlmPairs


def read_vlm_pairs(config: VlmPairsConfig) -> VlmPairTable:
    """Read preferences between answers, of any format.

    Every image is hashed and its header checked, none decoded. Ties are dropped and counted.

    Raises:
        InputError: for the first bad row under `on_bad_row: stop`; or if nothing is found at the
            path, its format is unclear, or it has no rows.
    """
    check_limit(config.limit)
    found = scan_vlm(
        open_vlm_source(config.path, config.format, config.images),
        max_pixels=config.max_pixels,
        max_images=config.max_images,
        limit=config.limit,
        stop=config.on_bad_row == "stop",
    )
    found.check(config.path)
    return VlmPairTable(found.pairs, found.bad_rows, found.ties)


def validate_vlm_pairs(
    path: str, *, format: str = "auto", images: str | None = None, max_pixels: int
) -> ValidationReport:
    """Read every row and decode every image; list all problems.

    Args:
        path: file, folder or pattern, as `VlmPairsConfig.path`.
        format: its format.
        images: folder of its images.
        max_pixels: larger images are bad.

    Raises:
        InputError: if there is nothing to check.
    """
    source = open_vlm_source(path, format, images)
    limit = VlmPairsConfig().max_images
    found = scan_vlm(source, max_pixels=max_pixels, max_images=limit, full=True)
    return ValidationReport(
        rows=found.rows, bad_rows=found.bad_rows, ties=found.ties, duplicates=found.duplicates
    )


def scan_vlm(
    source: VlmFiles,
    *,
    max_pixels: int,
    max_images: int,
    limit: int | None = None,
    stop: bool = False,
    full: bool = False,
) -> VlmScan:
    """Go through a source once and check every row.

    Args:
        source: where rows come from.
        max_pixels: larger images are bad.
        max_images: rows with more are bad.
        limit: end after so many good pairs.
        stop: raise at the first bad row instead of listing it.
        full: decode every image instead of reading its header only.

    Raises:
        InputError: for the first bad row under `stop`.
    """
    known: list[_Known] = []
    found = VlmScan(VlmPairs(source, known))
    seen: dict[str, str] = {}
    for row in tqdm(source.rows(), desc="read pairs", unit="row", delay=BAR_DELAY):
        found.rows += 1
        checked: PairInfo | BadRow | None
        checked = _check(row, max_pixels, max_images, full) if isinstance(row, VlmRow) else row
        if isinstance(checked, PairInfo):
            before = repeated(row.where, checked, seen)
            if before is not None:
                found.duplicates += 1
                checked = BadRow(row.where, before)
        if checked is None:
            found.ties += 1
        elif isinstance(checked, BadRow):
            found.refuse(checked, stop=stop)
        elif isinstance(row, VlmRow):
            # Image cells may be whole pictures; their key finds them again.
            record = row.record._replace(images=[], videos=[])
            known.append(_Known(checked, row.where, record, row.key))
            if len(known) == limit:
                break
    return found


def _check(row: VlmRow, max_pixels: int, max_images: int, full: bool) -> PairInfo | BadRow | None:
    """Check a row; None for a tie."""
    problems = []
    hashes = []
    if len(row.images) > max_images:
        problems.append(f"has {len(row.images)} images, more than max_images {max_images}")
    for number, ref in enumerate(row.images, start=1):
        try:
            hashes.append(hash_image(ref))
            (decode if full else check_header)(ref, max_pixels)
        except RowError as error:
            problems.append(f"image {number}: {error}")
    try:
        texts = (row.record.chosen, row.record.rejected)
        chosen, rejected = (content_hash(text.encode()) for text in texts)
        info = row_to_info(row.record.fields, content_hash(b"".join([chosen, *hashes])), rejected)
    except RowError as error:
        problems.append(str(error))
    if problems:
        return BadRow(row.where, "; ".join(problems))
    return info
