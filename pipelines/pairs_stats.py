"""`mmalign pairs stats`: counts and score gaps of a set of pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from mmalign.config import VlmPairsConfig
from mmalign.data.detect import open_source
from mmalign.data.readers import PairTable, Scan, scan
from mmalign.data.stats import PairStats, pair_stats, plot_gaps
from mmalign.data.vlm_readers import VlmPairTable, VlmScan, scan_vlm
from mmalign.data.vlm_source import has_answers, open_vlm_source
from mmalign.types import InputError

if TYPE_CHECKING:
    from mmalign.config import PairsCheckConfig


def run(config: PairsCheckConfig) -> None:
    """Print counts and gap quantiles, and write the histogram of gaps.

    Every image is decoded, so that the bad rows are those of `pairs validate`.

    Raises:
        InputError: if the pairs cannot be found, there are no rows, or the picture cannot be
            written.
    """
    found = _scan(config)
    if not found.rows:
        raise InputError(f"{config.path} has no rows")
    if isinstance(found, VlmScan):
        stats = pair_stats(VlmPairTable(found.pairs, found.bad_rows, found.ties))
    else:
        stats = pair_stats(PairTable(found.pairs, found.bad_rows, found.ties))
    tqdm.write(stats_text(stats))
    if stats.gaps:
        plot_gaps(stats.gaps, config.output)
        tqdm.write(f"histogram of gaps: {config.output}")
    else:
        tqdm.write("no pair has scores or a margin: there is no histogram to draw")


def _scan(config: PairsCheckConfig) -> Scan | VlmScan:
    if has_answers(config.path, config.format):
        answers = open_vlm_source(config.path, config.format, config.images)
        limit = VlmPairsConfig().max_images
        return scan_vlm(answers, max_pixels=config.max_pixels, max_images=limit, full=True)
    source = open_source(config.path, config.format)
    return scan(source, max_pixels=config.max_pixels, full=True)


def stats_text(stats: PairStats) -> str:
    """Lay out the counts as lines of text."""
    lines = [
        f"pairs     {stats.pairs}",
        f"prompts   {stats.prompts}",
        f"ties      {stats.ties} (dropped)",
        f"bad rows  {stats.bad_rows} (skipped; `mmalign pairs validate` lists them)",
        f"gaps      {len(stats.gaps)} known",
    ]
    lines += [f"  p{100 * q:<5g} {gap:.6g}" for q, gap in stats.gap_quantiles.items()]
    lines += [f"source    {name}: {count}" for name, count in sorted(stats.sources.items())]
    return "\n".join(lines)
