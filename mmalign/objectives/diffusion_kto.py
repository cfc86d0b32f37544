"""Diffusion-KTO (Li et al. 2024, arXiv 2404.04465): single samples labelled good or bad.

With g = ref error - policy error, the log-ratio of a sample, kl a baseline and y = +1 for good, -1
for bad samples, equation 8 of the paper with the sigmoid utility is

    loss = weight * (1 - sigmoid( y beta (g - kl) ))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from mmalign.objectives.preference import accuracy

KlEstimate = Literal["batch_mean", "balanced_mean", "none"]


def _same(mean: Tensor) -> Tensor:
    return mean


def diffusion_kto_loss(
    policy_error: Tensor,
    ref_error: Tensor,
    desirable: Tensor,
    *,
    beta: float,
    kl_estimate: KlEstimate = "batch_mean",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    over_processes: Callable[[Tensor], Tensor] = _same,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of each sample from denoising errors.

    The baseline gets no gradient.

    Args:
        policy_error: denoising errors of the policy (N,).
        ref_error: denoising errors of the reference (N,); treated as constants.
        desirable: labels (N,), true for good samples.
        beta: strength of the pull to the reference, in units of one over a mean squared error;
            1000 in the authors' runs.
        kl_estimate: baseline: the mean of g (`batch_mean`, the authors'), the mean of the means of
            good and bad samples (`balanced_mean`), both at least 0 as a divergence is, or 0
            (`none`).
        desirable_weight: weight of good samples.
        undesirable_weight: weight of bad samples.
        over_processes: averages the means that the baseline is made of, as the authors do over all
            processes; they are this batch's when omitted.

    Returns:
        Losses (N,), and metrics: `rewards/chosen` and `rewards/rejected` are means of beta * g
        over good and bad samples (NaN when the batch has none), `rewards/margin` and `margin`
        their difference with and without beta, `rewards/accuracy` the share of samples on their
        side of the baseline, `kl`, and mean denoising errors per network and label.

    Raises:
        ValueError: If the three tensors are not all (N,).
    """
    if not policy_error.shape == ref_error.shape == desirable.shape or policy_error.ndim != 1:
        raise ValueError("policy_error, ref_error and desirable must all have shape (N,)")
    good = desirable.bool()
    logratios = ref_error.detach() - policy_error
    kl = _baseline(logratios.detach(), good, kl_estimate, over_processes)
    sign = torch.where(good, 1.0, -1.0).to(logratios)
    weight = torch.where(good, desirable_weight, undesirable_weight).to(logratios)
    advantage = sign * (logratios - kl)
    # 1 - sigmoid(x) = sigmoid(-x), which keeps its digits where the sample is already well placed.
    loss = weight * torch.sigmoid(-beta * advantage)
    metrics = {"rewards/accuracy": accuracy(advantage), "kl": kl}
    metrics |= _rewards(logratios.detach(), good, beta)
    return loss, metrics | _errors(policy_error.detach(), ref_error.detach(), good)


def _baseline(
    logratios: Tensor,
    good: Tensor,
    kl_estimate: KlEstimate,
    over_processes: Callable[[Tensor], Tensor],
) -> Tensor:
    match kl_estimate:
        case "batch_mean":
            mean = over_processes(logratios.mean())
        case "balanced_mean":
            # A batch with one label only has one mean.
            sides = torch.stack([logratios[good].mean(), logratios[~good].mean()])
            mean = over_processes(sides.nanmean())
        case "none":
            mean = logratios.new_zeros(())
    return mean.clamp(min=0)


def _rewards(logratios: Tensor, good: Tensor, beta: float) -> dict[str, Tensor]:
    chosen, rejected = logratios[good].mean(), logratios[~good].mean()
    return {
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        "rewards/margin": beta * (chosen - rejected),
        "margin": chosen - rejected,
    }


def _errors(policy_error: Tensor, ref_error: Tensor, good: Tensor) -> dict[str, Tensor]:
    return {
        f"denoising_error/{network}_{side}": error[rows].mean()
        for network, error in (("policy", policy_error), ("ref", ref_error))
        for side, rows in (("chosen", good), ("rejected", ~good))
    }
