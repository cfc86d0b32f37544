"""ROCM (Shekhar and Zhang 2025, arXiv 2503.06171): reward through a consistency model's sampler.

    loss = -reward(x_0) + weight * sum over steps of D( p_policy(next | x_t), p_ref(next | x_t) )

Both transitions are Gaussians of equal std s (`mmalign.diffusion.consistency_transition`), so with
d the difference of their means the divergences have closed forms, except Jensen-Shannon's, which is
estimated with the noise that was drawn. The last step is deterministic and has none.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from mmalign.diffusion import Reduction, Transition, per_sample

Divergence = Literal["kl", "hellinger", "fisher", "js"]


def transition_divergence(
    policy: Transition,
    reference: Transition,
    noise: Tensor,
    *,
    divergence: Divergence,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute D(policy || reference) for steps of equal std, (B,).

    KL = |d|^2 / (2 s^2); squared Hellinger distance = 1 - exp(-|d|^2 / (8 s^2)); relative Fisher
    information = |d|^2 / s^4; Jensen-Shannon divergence in nats, from the draws mean + s * noise of
    both sides, unbiased. With `reduction` `mean`, |d|^2 is the mean over elements (and Jensen-
    Shannon the mean of the elements' divergences) instead of the sum: the joint Hellinger and
    Jensen-Shannon divergences of thousands of elements are at their maximum, without gradient.

    Args:
        policy: the policy's step.
        reference: the reference's step from the same latents; treated as a constant.
        noise: standard normal noise (B, C, h, w) of the draw; used by `js` alone.
        divergence: which divergence.
        reduction: over the elements of a sample.

    Raises:
        ValueError: If a step is deterministic or an option is unknown.
    """
    if not bool((policy.std > 0).all()):
        raise ValueError("a deterministic sampler step has no divergence")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum, got {reduction!r}")
    std = policy.std.detach()
    difference = policy.mean - reference.mean.detach()
    if divergence == "js":
        return _jensen_shannon(difference / per_sample(std, difference), noise, reduction)
    elements = difference.flatten(1).square()
    squared = elements.mean(1) if reduction == "mean" else elements.sum(1)
    match divergence:
        case "kl":
            return squared / (2 * std.square())
        case "hellinger":
            return -torch.expm1(-squared / (8 * std.square()))
        case "fisher":
            return squared / std**4
        case unknown:
            raise ValueError(f"unknown divergence {unknown!r}")


def _jensen_shannon(shift: Tensor, noise: Tensor, reduction: Reduction) -> Tensor:
    """Estimate it from one draw of each side; `shift` is the difference of means over std."""
    # log p_policy - log p_ref at both draws: of mu + s z, and of mu_ref + s z.
    at_policy = shift * (noise + shift / 2)
    at_reference = shift * (noise - shift / 2)
    if reduction == "sum":
        at_policy, at_reference = (r.flatten(1).sum(1) for r in (at_policy, at_reference))
    values = math.log(2) - (softplus(-at_policy) + softplus(at_reference)) / 2
    return values if reduction == "sum" else values.flatten(1).mean(1)
