"""MaPO: margin-aware preference optimization without a reference.

Hong et al. 2024, arXiv 2406.06424. With m the denoising error of the policy, s = `error_scale`, T
= `score_scale` and odds(m) = s m / (exp(s m) - 1), which falls from 1 to 0 as the error grows:

    loss = m_chosen - beta log sigmoid( T [ odds(m_chosen) - odds(m_rejected) ] )

The form is that of the authors' released code, where s is called snr and is 0.5 and T is 1000.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmalign.objectives.errors import error_metrics, split_pairs
from mmalign.objectives.preference import preference_metrics, sigmoid_loss
from mmalign.types import LogRatios

_SERIES_LIMIT = 1e-2


def mapo_loss(
    policy_error: Tensor, *, beta: float, score_scale: float = 1000.0, error_scale: float = 0.5
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of each pair from the policy's denoising errors.

    Args:
        policy_error: denoising errors of the policy (2B,), `[chosen; rejected]`, not negative.
        beta: weight of the margin term against the chosen side's error; 0.1 in the authors' runs.
        score_scale: T, multiplies the difference of the odds.
        error_scale: s, multiplies errors inside the odds; one over a mean squared error.

    Returns:
        Losses (B,), and metrics: implicit rewards T * odds with their accuracy, `margin`
        (difference of the odds before T), and both mean denoising errors.
    """
    chosen_error, _ = split_pairs(policy_error)
    odds = LogRatios(*split_pairs(_odds(error_scale * policy_error)))
    loss = chosen_error + beta * sigmoid_loss(odds.chosen - odds.rejected, score_scale)
    return loss, {**preference_metrics(odds, beta=score_scale), **error_metrics(policy_error)}


def _odds(x: Tensor) -> Tensor:
    """Compute x / (exp(x) - 1) for x >= 0, without overflow and with its limit 1 at 0."""
    small = x < _SERIES_LIMIT
    series = 1 - x / 2 + x.square() / 12 - x.pow(4) / 720
    # The branch that is not taken must not produce a NaN gradient either.
    safe = torch.where(small, torch.ones_like(x), x)
    return torch.where(small, series, safe * torch.exp(-safe) / -torch.expm1(-safe))
