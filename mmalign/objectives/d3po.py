"""D3PO (Yang et al. 2023, arXiv 2311.13231) and SPO (Liang et al. 2024, arXiv 2406.04314).

Every stochastic sampler step of two trajectories is a decision of its own. With r the log-ratio of
the latents that were drawn (`mmalign.diffusion.transition_logratio`, averaged over elements as in
both official codes):

    loss = -log sigmoid( beta clamp(r_chosen) - beta clamp(r_rejected) )

D3PO labels all steps by the final images and takes beta 0.1; SPO labels each step by a preference
model of predicted images and takes beta 10. Clamping is not in the papers but in both codes.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mmalign.config import PreferenceConfig
from mmalign.objectives.preference import preference_loss, preference_metrics
from mmalign.types import LogRatios

Clamp = Literal["both", "one_sided", "none"]


def clamp_logratios(logratios: LogRatios, *, clip_range: float, clamp: Clamp) -> LogRatios:
    """Clamp the ratios exp(r) to [1 - clip_range, 1 + clip_range].

    `both` is the official codes' clamp: it also stops a chosen sample whose ratio fell below the
    interval from ever coming back. `one_sided` clamps a chosen sample only from above and a
    rejected one only from below, as PPO's minimum does. `none` leaves them alone.

    Raises:
        ValueError: If `clip_range` is not in (0, 1).
    """
    if clamp == "none":
        return logratios
    if not 0 < clip_range < 1:
        raise ValueError(f"clip_range must be in (0, 1), got {clip_range}")
    low, high = math.log1p(-clip_range), math.log1p(clip_range)
    if clamp == "one_sided":
        return LogRatios(logratios.chosen.clamp(max=high), logratios.rejected.clamp(min=low))
    return LogRatios(*(side.clamp(low, high) for side in logratios))


def d3po_loss(
    logratios: LogRatios,
    *,
    beta: float,
    preference: PreferenceConfig,
    clip_range: float = 0.1,
    clamp: Clamp = "one_sided",
    score_margins: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of each pair of sampler steps.

    Args:
        logratios: log-ratios of the latents drawn at one step of both trajectories, (B,) each.
        beta: strength of the pull to the reference, in units of one over a log-ratio that is
            averaged over elements; 0.1 in D3PO's runs, 10 in SPO's.
        preference: the loss on log-ratios.
        clip_range: largest distance of a ratio from 1 that still gets a gradient.
        clamp: which side of the interval is clamped; the official codes clamp `both`.
        score_margins: score of chosen minus score of rejected (B,), for the `offset` loss.

    Returns:
        Losses (B,), and the metrics of `preference_loss`, taken before clamping except for the
        loss, with `clamped`, the share of log-ratios without gradient.
    """
    clamped = clamp_logratios(logratios, clip_range=clip_range, clamp=clamp)
    loss, _ = preference_loss(clamped, beta=beta, config=preference, score_margins=score_margins)
    with torch.no_grad():
        metrics = preference_metrics(logratios, beta=beta)
        pairs = zip(logratios, clamped, strict=True)
        metrics["clamped"] = torch.stack([(a != b).float().mean() for a, b in pairs]).mean()
    return loss, metrics


class BestWorst(NamedTuple):
    """Positions of the best and the worst candidate, (B,) int64 each, and which pairs count."""

    best: Tensor
    worst: Tensor
    decided: Tensor


def dominating_pair(scores: Tensor) -> BestWorst:
    """Pair a candidate with one it dominates: no reward is lower and at least one is higher.

    Of several such pairs, the one with the largest summed gap. Without any, the prompt is undecided
    (D3PO's official code calls that a tie).

    Args:
        scores: scores of R rewards, each times its weight, (R, K, B).

    Raises:
        ValueError: If there are fewer than two candidates.
    """
    if scores.ndim != 3 or scores.shape[1] < 2:
        raise ValueError(f"scores must be (R, K, B) with K >= 2, got {tuple(scores.shape)}")
    gaps = scores[:, :, None] - scores[:, None]
    dominates = (gaps >= 0).all(0) & (gaps > 0).any(0)
    summed = gaps.sum(0).masked_fill(~dominates, -math.inf).flatten(0, 1)
    largest, place = summed.max(0)
    candidates = scores.shape[1]
    return BestWorst(place // candidates, place % candidates, largest > -math.inf)


def best_and_worst(scores: Tensor, *, min_gap: float = 0.0) -> BestWorst:
    """Pair the best with the worst of K candidates.

    A pair is decided when sigmoid(s_best - s_worst) - sigmoid(s_worst - s_best), the gap between
    their softmax shares, is above `min_gap` (SPO takes 0.3 for Stable Diffusion, 0.4 for SDXL).

    Args:
        scores: scores of the candidates (K, B).
        min_gap: in [0, 1); 0 leaves out ties only.

    Raises:
        ValueError: If there are fewer than two candidates or `min_gap` is out of range.
    """
    if scores.ndim != 2 or len(scores) < 2:
        raise ValueError(f"scores must be (K, B) with K >= 2, got {tuple(scores.shape)}")
    if not 0 <= min_gap < 1:
        raise ValueError(f"min_gap must be in [0, 1), got {min_gap}")
    high, low = scores.max(0), scores.min(0)
    gap = torch.tanh((high.values - low.values) / 2)
    return BestWorst(high.indices, low.indices, gap > min_gap)
