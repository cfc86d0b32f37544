"""DRaFT (Clark et al. 2023, arXiv 2309.17400): a differentiable reward, through the sampler.

    loss = -mean over n + 1 images of reward + kl_weight * divergence

The images are x_0 of the sampled trajectory and, for DRaFT-LV, n further ones that come from
noising x_0 to the last step's noise level again, which gives more gradients of the same last step.
The average over n + 1 terms is the one of FlowBP's code; the paper sums. The divergence is that of
DRaFT+: the mean squared difference between the outputs of policy and reference.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draft_loss(
    rewards: Tensor, divergence: Tensor | None = None, *, kl_weight: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of each prompt.

    Args:
        rewards: rewards (n + 1, B): of x_0 and of the n low-variance images.
        divergence: divergence from the reference (B,), needed with `kl_weight`.
        kl_weight: weight of the divergence, in units of reward.

    Returns:
        Losses (B,), and metrics as detached scalars: `reward` is that of x_0.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be (n + 1, B), got {tuple(rewards.shape)}")
    loss = -rewards.mean(0)
    metrics = {"reward": rewards[0].detach().mean()}
    if divergence is not None:
        if divergence.shape != loss.shape:
            raise ValueError(f"divergence must be {tuple(loss.shape)}, got {divergence.shape}")
        loss = loss + kl_weight * divergence
        metrics["divergence"] = divergence.detach().mean()
    elif kl_weight:
        raise ValueError("kl_weight needs a divergence")
    return loss, metrics


def noised_again(latents: Tensor, noise: Tensor, alpha: Tensor | float) -> Tensor:
    """Noise detached clean latents to alpha-bar `alpha`: sqrt(a) sg(x_0) + sqrt(1 - a) noise."""
    level = torch.as_tensor(alpha, dtype=latents.dtype, device=latents.device)
    return level.sqrt() * latents.detach() + (1 - level).sqrt() * noise
