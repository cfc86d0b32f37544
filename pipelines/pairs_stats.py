"""`mmalign pairs stats`: counts and score gaps of a set of pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from mmalign.config import PairsConfig, VlmPairsConfig
from mmalign.data.readers import PairTable, read_pairs
from mmalign.data.stats import PairStats, pair_stats, plot_gaps
from mmalign.data.vlm_readers import VlmPairTable, read_vlm_pairs
from mmalign.data.vlm_source import has_answers

if TYPE_CHECKING:
    from mmalign.config import PairsCheckConfig


def run(config: PairsCheckConfig) -> None:
    """Print counts and gap quantiles, and write the histogram of gaps.

    Raises:
        InputError: if the pairs cannot be found or the picture cannot be written.
    """
    table = _table(config)
    stats = pair_stats(table)
    tqdm.write(stats_text(stats))
    if stats.gaps:
        plot_gaps(stats.gaps, config.output)
        tqdm.write(f"histogram of gaps: {config.output}")
    else:
        tqdm.write("no pair has scores or a margin: there is no histogram to draw")


def _table(config: PairsCheckConfig) -> PairTable | VlmPairTable:
    common: dict[str, Any] = {
        "path": config.path,
        "format": config.format,
        "max_pixels": config.max_pixels,
        "on_bad_row": "skip",
    }
    if has_answers(config.path, config.format):
        return read_vlm_pairs(VlmPairsConfig(**common, images=config.images))
    return read_pairs(PairsConfig(**common))


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
