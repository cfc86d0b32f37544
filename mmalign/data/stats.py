"""What a set of pairs looks like in numbers, and its gaps as a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmalign.data.files import atomic_path
from mmalign.data.readers import PairTable, describe
from mmalign.data.vlm_readers import VlmPairTable

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
BINS = 40


@dataclass(frozen=True, kw_only=True)
class PairStats:
    """Counts of a table of pairs.

    `gaps` are the margins that are known; `gap_quantiles` maps 0, 0.1, ... 1 to a gap and is empty
    without any. `sources` counts pairs per `source`.
    """

    pairs: int
    ties: int
    bad_rows: int
    prompts: int
    gaps: list[float]
    gap_quantiles: dict[float, float]
    sources: dict[str, int]


def pair_stats(table: PairTable | VlmPairTable) -> PairStats:
    """Count pairs, prompts, ties and gaps."""
    infos = table.pairs.infos if isinstance(table, VlmPairTable) else describe(table.pairs)
    gaps = [info.margin for info in infos if info.margin is not None]
    values = np.quantile(gaps, QUANTILES).tolist() if gaps else []
    return PairStats(
        pairs=len(infos),
        ties=table.ties,
        bad_rows=len(table.bad_rows),
        prompts=len({info.prompt for info in infos}),
        gaps=gaps,
        gap_quantiles=dict(zip(QUANTILES, values, strict=False)),
        sources=dict(Counter(info.source for info in infos if info.source is not None)),
    )


def plot_gaps(gaps: Sequence[float], path: Path | str) -> None:
    """Draw the histogram of score gaps; PNG, SVG or PDF by the suffix.

    Raises:
        InputError: if the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    target = Path(path).expanduser()
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.hist(gaps, bins=min(BINS, 5 + len(gaps) // 4), color="#4c72b0")
    median = float(np.median(gaps))
    axes.axvline(median, color="#222222", linestyle="--")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"{len(gaps)} score gaps, median {median:.3g}")
    axes.set(xlabel="score_chosen - score_rejected", ylabel="pairs")
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(target) as temporary:
        figure.savefig(temporary, format=target.suffix.lstrip(".") or "png", dpi=150)
