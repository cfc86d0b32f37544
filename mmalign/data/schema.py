"""What a preference pair is on disk, whatever the file format.

Canonical columns are `prompt`, `chosen`, `rejected` and, optionally, `score_chosen`,
`score_rejected`, `margin`, `source` and `pair_id`. Each format's reader turns its rows into `Row`,
`Tie` or `BadRow`; everything after that is common. Rows, lines and records are numbered from 1.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from mmalign.types import ImageRef

CHOSEN, REJECTED = "chosen", "rejected"
REQUIRED_COLUMNS = ("prompt", CHOSEN, REJECTED)
OPTIONAL_COLUMNS = ("score_chosen", "score_rejected", "margin", "source", "pair_id")
CHOSEN_FILE, REJECTED_FILE = "chosen_file_name", "rejected_file_name"
MARGIN_TOLERANCE = 1e-3
HASH_BYTES = 16


class RowError(ValueError):
    """One row or image is unusable; the message says why, the catcher knows where."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """An unusable row: where it is (file and row number) and what is wrong with it."""

    where: str
    problem: str

    def __str__(self) -> str:
        """Join both to one line."""
        return f"{self.where}: {self.problem}"


class Tie(NamedTuple):
    """A row without a preference."""

    where: str


class Row(NamedTuple):
    """A row as its file gives it: columns, and images that have not been decoded.

    `key` is what the source needs to find the images again.
    """

    where: str
    fields: Mapping[str, object]
    chosen: ImageRef
    rejected: ImageRef
    key: object


class PairSource(Protocol):
    """One data set on disk: lists its rows once, then finds the images of any of them again."""

    def rows(self) -> Iterator[Row | Tie | BadRow]:
        """List the rows in order, holding few images at a time."""
        ...

    def images(self, key: object) -> tuple[ImageRef, ImageRef]:
        """Return the chosen and the rejected image of the row with this key."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PairInfo:
    """Everything about a pair but its images, of which it has the hashes of the encoded bytes."""

    pair_id: str
    prompt: str
    score_chosen: float | None
    score_rejected: float | None
    margin: float | None
    source: str | None
    chosen_hash: bytes
    rejected_hash: bytes


def content_hash(data: bytes) -> bytes:
    """Hash encoded bytes (BLAKE2b, 16 bytes)."""
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()


def content_id(prompt: str, chosen_hash: bytes, rejected_hash: bytes) -> str:
    """Identify a pair by its prompt and the bytes of its images, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    for part in (chosen_hash, rejected_hash, prompt.encode("utf-8", "surrogatepass")):
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def row_to_info(
    fields: Mapping[str, object], chosen_hash: bytes, rejected_hash: bytes
) -> PairInfo | None:
    """Check the columns of a row; returns None for a tie.

    Labels decide who wins and scores only say by how much, but a margin of exactly 0 is a tie.

    Args:
        fields: columns by name; unknown ones are ignored.
        chosen_hash: `content_hash` of the chosen image.
        rejected_hash: the same of the rejected one.

    Raises:
        RowError: for an empty prompt, or scores that are not finite numbers or contradict the
            margin.
    """
    prompt = read_prompt(fields)
    score_chosen, score_rejected = _score(fields, "score_chosen"), _score(fields, "score_rejected")
    margin = _margin(_score(fields, "margin"), score_chosen, score_rejected)
    if margin == 0:
        return None
    return PairInfo(
        pair_id=_text(fields, "pair_id") or content_id(prompt, chosen_hash, rejected_hash),
        prompt=prompt,
        score_chosen=score_chosen,
        score_rejected=score_rejected,
        margin=margin,
        source=_text(fields, "source"),
        chosen_hash=chosen_hash,
        rejected_hash=rejected_hash,
    )


def read_prompt(fields: Mapping[str, object]) -> str:
    """Return the prompt of a row.

    Raises:
        RowError: if it is missing, empty, not a text or not valid Unicode.
    """
    require(fields, ["prompt"])
    prompt = fields["prompt"]
    if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
        raise RowError("the prompt is empty")
    if not isinstance(prompt, str):
        raise RowError(f"the prompt is a {type(prompt).__name__}, not a text")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise RowError("the prompt is not valid Unicode (a lone surrogate)")
    return prompt


def require(present: Iterable[str], columns: Iterable[str]) -> None:
    """Check that columns or keys are there.

    Raises:
        RowError: naming the missing one, and the nearest that is present or else all of them.
    """
    names = [str(name) for name in present]
    for column in columns:
        if column not in names:
            nearest = difflib.get_close_matches(column, names, n=1)
            hint = f"the nearest present is {nearest[0]!r}" if nearest else _listed(names)
            raise RowError(f"{column!r} is missing; {hint}")


def _listed(names: list[str]) -> str:
    return f"there are {', '.join(map(repr, names[:8]))}" if names else "there are none"


def _margin(margin: float | None, chosen: float | None, rejected: float | None) -> float | None:
    if chosen is None or rejected is None:
        return margin
    gap = chosen - rejected
    if margin is not None and abs(margin - gap) > MARGIN_TOLERANCE * max(1.0, abs(gap)):
        raise RowError(f"margin {margin:g} is not score_chosen - score_rejected = {gap:g}")
    return gap


def _score(fields: Mapping[str, object], name: str) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowError(f"{name} is {str(value)[:40]!r}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RowError(f"{name} is {number}, not a finite number")
    return number


def _text(fields: Mapping[str, object], name: str) -> str | None:
    value = fields.get(name)
    return None if value is None or value == "" else str(value)
