"""Checking pairs thoroughly, without torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmalign.data.detect import open_source
from mmalign.data.readers import scan
from mmalign.data.schema import BadRow


@dataclass
class ValidationReport:
    """Everything wrong with a set of pairs; duplicates are among the bad rows."""

    rows: int
    bad_rows: list[BadRow] = field(default_factory=list)
    ties: int = 0
    duplicates: int = 0


def validate_pairs(path: str, *, format: str = "auto", max_pixels: int) -> ValidationReport:
    """Read every row and decode every image; list all problems.

    Args:
        path: file, folder or pattern, as `PairsConfig.path`.
        format: its format.
        max_pixels: larger images are bad.

    Raises:
        InputError: if there is nothing to check: no such path, an unknown format, a column missing
            from the file as a whole.
    """
    found = scan(open_source(path, format), max_pixels=max_pixels, full=True)
    return ValidationReport(
        rows=found.rows, bad_rows=found.bad_rows, ties=found.ties, duplicates=found.duplicates
    )
