"""`mmalign pairs stats`: counts and score gaps of a set of pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from mmalign.config import PairsConfig
from mmalign.data.readers import read_pairs
from mmalign.data.stats import PairStats, pair_stats, plot_gaps

if TYPE_CHECKING:
    from mmalign.config import PairsCheckConfig


def run(config: PairsCheckConfig) -> None:
    """Print counts and gap quantiles, and write the histogram of gaps.

    Raises:
        InputError: if the pairs cannot be found or the picture cannot be written.
    """
    table = read_pairs(
        PairsConfig(
            path=config.path,
            format=config.format,
            max_pixels=config.max_pixels,
            on_bad_row="skip",
        )
    )
    stats = pair_stats(table)
    tqdm.write(stats_text(stats))
    if stats.gaps:
        plot_gaps(stats.gaps, config.output)
        tqdm.write(f"histogram of gaps: {config.output}")
    else:
        tqdm.write("no pair has scores or a margin: there is no histogram to draw")


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
