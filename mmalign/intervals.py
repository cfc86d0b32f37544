"""Win rates and means with bootstrap intervals.

Intervals are percentile bootstrap intervals clustered by prompt: whole prompts are drawn with
replacement, because images of one prompt are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmalign.randomness import keyed_generator
from mmalign.types import InputError

RESAMPLES = 2000


class WinRate(NamedTuple):
    """How often the candidate beats the baseline.

    `value` is wins / (wins + losses), so ties say nothing; it and `ci95` are NaN when nothing was
    decided. `value_with_ties` counts a tie as half a win. `n` counts all comparisons.
    """

    value: float
    ci95: tuple[float, float]
    n: int
    wins: int
    losses: int
    ties: int
    value_with_ties: float


class Mean(NamedTuple):
    """A mean with its 95 % interval."""

    value: float
    ci95: tuple[float, float]


def win_rate(
    candidate: Sequence[float] | Tensor,
    baseline: Sequence[float] | Tensor,
    groups: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> WinRate:
    """Compare scores pairwise; equal scores are ties.

    The interval is over resamples in which at least one pair was decided. If all decided pairs of
    all prompts agree it has no width: that is a property of the bootstrap, not certainty.

    Args:
        candidate: scores (N,).
        baseline: scores (N,) of the same prompts and seeds.
        groups: prompt of each comparison.
        seed: of the bootstrap.
        resamples: number of bootstrap resamples.

    Raises:
        InputError: if there is nothing to compare, lengths differ or a score is not finite.
    """
    difference = checked_values(candidate, groups) - checked_values(baseline, groups)
    wins = _cluster_sums((difference > 0).double(), groups)
    losses = _cluster_sums((difference < 0).double(), groups)
    draws = _bootstrap(len(wins), seed, resamples)
    won, lost = wins[draws].sum(1), losses[draws].sum(1)
    decided = won + lost > 0
    won_total, lost_total, n = int(wins.sum()), int(losses.sum()), len(difference)
    ties = n - won_total - lost_total
    known = won_total + lost_total > 0
    return WinRate(
        value=won_total / (won_total + lost_total) if known else float("nan"),
        ci95=_interval((won / (won + lost))[decided]) if known else (float("nan"), float("nan")),
        n=n,
        wins=won_total,
        losses=lost_total,
        ties=ties,
        value_with_ties=(won_total + ties / 2) / n,
    )


def mean_ci(
    values: Sequence[float] | Tensor,
    groups: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Mean:
    """Average values with a bootstrap interval clustered by group.

    Args:
        values: (N,).
        groups: prompt of each value.
        seed: of the bootstrap.
        resamples: number of bootstrap resamples.

    Raises:
        InputError: if there are no values, lengths differ or a value is not finite.
    """
    vector = checked_values(values, groups)
    sums = _cluster_sums(vector, groups)
    counts = _cluster_sums(torch.ones_like(vector), groups)
    draws = _bootstrap(len(sums), seed, resamples)
    means = sums[draws].sum(1) / counts[draws].sum(1)
    return Mean(float(vector.mean()), _interval(means))


def checked_values(values: Sequence[float] | Tensor, groups: Sequence[str]) -> Tensor:
    """Turn one number per group's member into a vector (N,) of float64 on CPU.

    Raises:
        InputError: if there are no values, lengths differ or a value is not finite.
    """
    vector = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    if vector.shape != (len(groups),) or not len(groups):
        raise InputError(f"{vector.numel()} values for {len(groups)} prompts: need one each, not 0")
    if not bool(torch.isfinite(vector).all()):
        index = int((~torch.isfinite(vector)).nonzero()[0])
        raise InputError(f"value {float(vector[index])} for prompt {groups[index]!r}")
    return vector


def _cluster_sums(values: Tensor, groups: Sequence[str]) -> Tensor:
    ids = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    rows = torch.tensor([ids[group] for group in groups])
    return torch.zeros(len(ids), dtype=values.dtype).index_add(0, rows, values)


def _bootstrap(clusters: int, seed: int, resamples: int) -> Tensor:
    generator = keyed_generator(seed, "bootstrap")
    return torch.randint(clusters, (resamples, clusters), generator=generator)


def _interval(values: Tensor) -> tuple[float, float]:
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high
