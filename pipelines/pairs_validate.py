"""`mmalign pairs validate`: list every bad row of a set of pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from mmalign.data.validate import ValidationReport, validate_pairs
from mmalign.data.vlm_readers import validate_vlm_pairs
from mmalign.data.vlm_source import has_answers
from mmalign.types import InputError

if TYPE_CHECKING:
    from mmalign.config import PairsCheckConfig


def run(config: PairsCheckConfig) -> None:
    """Print one line per bad row, then the counts.

    Raises:
        InputError: if there are bad rows, or nothing that can be checked.
    """
    report = _report(config)
    for bad in report.bad_rows:
        tqdm.write(_printable(str(bad)))
    tqdm.write(
        f"{report.rows} rows: {report.rows - report.ties - len(report.bad_rows)} good, "
        f"{report.ties} ties, {len(report.bad_rows)} bad ({report.duplicates} duplicates)"
    )
    if report.bad_rows:
        raise InputError(f"{config.path} has {len(report.bad_rows)} bad rows")
    if not report.rows:
        raise InputError(f"{config.path} has no rows")


def _report(config: PairsCheckConfig) -> ValidationReport:
    if has_answers(config.path, config.format):
        return validate_vlm_pairs(
            config.path, format=config.format, images=config.images, max_pixels=config.max_pixels
        )
    return validate_pairs(config.path, format=config.format, max_pixels=config.max_pixels)


def _printable(line: str) -> str:
    """Escape control characters: a file name must not speak to the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
