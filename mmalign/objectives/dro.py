"""Direct reward optimization of DSO (Li et al. 2025, arXiv 2503.22677): labels without pairs.

With o = 1 for good samples and 0 for bad ones, and e the denoising error:

    loss = (2 o - 1) e

Good samples are fitted, bad ones un-fitted, without a reference. That is unbounded below: the
authors rely on a tiny learning rate. Two options bound it by the reference's error e_ref: a cap
stops pushing a bad sample away once e >= (1 + cap) e_ref, and an anchor adds weight (e - e_ref)^2.
The authors' code averages e_chosen - e_rejected over pairs, which is twice this on balanced labels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dro_loss(
    policy_error: Tensor,
    desirable: Tensor,
    *,
    ref_error: Tensor | None = None,
    loser_cap: float | None = None,
    anchor_weight: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of each sample from denoising errors.

    Args:
        policy_error: denoising errors of the policy (N,).
        desirable: labels (N,), true for good samples.
        ref_error: denoising errors of the reference (N,), for `loser_cap` and `anchor_weight`.
        loser_cap: largest relative excess of a bad sample's error over the reference's that still
            gets a gradient, at least 0; no cap when omitted.
        anchor_weight: weight of the squared distance to the reference's error, in units of one over
            an error.

    Returns:
        Losses (N,), and metrics: mean errors per label (NaN when the batch has none) and `capped`,
        the share of bad samples at the cap.

    Raises:
        ValueError: If shapes differ, the cap is negative, or an option lacks `ref_error`.
    """
    if policy_error.shape != desirable.shape or policy_error.ndim != 1:
        raise ValueError("policy_error and desirable must both have shape (N,)")
    if ref_error is None and (loser_cap is not None or anchor_weight):
        raise ValueError("loser_cap and anchor_weight need ref_error")
    good = desirable.bool()
    loser = policy_error
    capped = torch.zeros_like(good)
    if loser_cap is not None and ref_error is not None:
        if loser_cap < 0:
            raise ValueError(f"loser_cap must be at least 0, got {loser_cap}")
        limit = (1 + loser_cap) * ref_error.detach()
        capped, loser = (policy_error >= limit) & ~good, torch.minimum(policy_error, limit)
    loss = torch.where(good, policy_error, -loser)
    if anchor_weight and ref_error is not None:
        loss = loss + anchor_weight * (policy_error - ref_error.detach()).square()
    return loss, {
        "denoising_error/policy_chosen": policy_error[good].detach().mean(),
        "denoising_error/policy_rejected": policy_error[~good].detach().mean(),
        "capped": capped[~good].float().mean(),
    }
