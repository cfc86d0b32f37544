"""TailorPO (arXiv 2502.01667): two candidates from one x_t, ranked by the reward of their x_0.

Both candidates are draws of the same Gaussian step N(mu, std^2 I), so policy and reference each run
once. With mu and mu_ref their means,

    margin = log-ratio(chosen) - log-ratio(rejected)
           = <x_chosen - x_rejected, mu - mu_ref> / std^2

which is the difference of four log-densities without computing any of them. (The official code of
SPO, whose loss this is, runs each network twice on the same input.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmalign.diffusion import Reduction, Transition, transition_logratio
from mmalign.types import LogRatios


def tailorpo_logratios(
    chosen_latents: Tensor,
    rejected_latents: Tensor,
    policy: Transition,
    reference: Transition,
    *,
    reduction: Reduction = "mean",
) -> LogRatios:
    """Compute the log-ratios of two candidates of one step, for `d3po_loss`, (B,) each.

    Args:
        chosen_latents: the preferred next latents (B, C, h, w); a constant.
        rejected_latents: the other ones; a constant.
        policy: the policy's step from the shared x_t.
        reference: the reference's step from it; a constant.
        reduction: `mean` averages log-densities over elements, `sum` gives the joint density.

    Raises:
        ValueError: If the step is deterministic.
    """
    fixed = Transition(*(part.detach() for part in reference))
    sides = (chosen_latents.detach(), rejected_latents.detach())
    return LogRatios(
        *(transition_logratio(side, policy, fixed, reduction=reduction) for side in sides)
    )


def guided_latents(latents: Tensor, rewards: Tensor, target: float, *, step_size: float) -> Tensor:
    """Move candidates so that their reward comes closer to `target`: the G of TailorPO-G.

    x <- x - step_size * grad_x (target - reward)^2, with the gradient of each sample scaled to unit
    norm per element, so that `step_size` is in units of latents whatever the reward's scale.

    Args:
        latents: latents (B, C, h, w) that `rewards` were computed from, with gradients.
        rewards: rewards (B,).
        target: the reward to reach; above anything seen, to push upwards.
        step_size: length of the step, in root-mean-square units of the latents.

    Returns:
        Moved latents, detached.
    """
    distance = (target - rewards).square().sum()
    (gradient,) = torch.autograd.grad(distance, latents)
    size = gradient.flatten(1).square().mean(1).sqrt().clamp(min=1e-12)
    return (latents - step_size * gradient / size.view(-1, 1, 1, 1)).detach()
