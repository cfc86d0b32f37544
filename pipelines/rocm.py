"""Train with ROCM (arXiv 2503.06171): reward through the sampler of a consistency model."""

from __future__ import annotations

import torch
from torch import Tensor

from mmalign.config import RocmConfig
from mmalign.objectives.draft import draft_loss
from mmalign.objectives.rocm import transition_divergence
from mmalign.pipelines._online import (
    OnlineRun,
    PromptBatch,
    bridged_rewards,
    stochastic_steps,
    train_online,
)
from mmalign.pipelines._training import Step
from mmalign.rollout import Sampler, differentiable_sample
from mmalign.types import StepOutput


def run(config: RocmConfig) -> None:
    """Train, evaluate and write the run folder.

    Raises:
        InputError: a reward without gradient, a sampler of one step, or unusable input.
    """
    train_online(
        config,
        method="rocm",
        families=("lcm",),
        make_step=lambda online: make_step(config, online),
        needs_gradient=True,
    )


def make_step(config: RocmConfig, online: OnlineRun) -> Step:
    """Make the training step."""
    stochastic = set(stochastic_steps(online)) if config.divergence_weight else set()

    def step(batch: PromptBatch) -> StepOutput:
        sampler = online.sampler(batch)
        clean, taken = differentiable_sample(
            sampler,
            online.noise(batch, "start"),
            lambda index: online.noise(batch, "step", index),
            backprop_steps=len(sampler),
        )
        rewards = bridged_rewards(online, clean, batch, config.decode_batch_size)
        moves = [move for move in taken if move[0] in stochastic]
        divergence = _divergence(config, online, batch, sampler, moves) if moves else None
        loss, metrics = draft_loss(
            rewards[None], divergence, kl_weight=config.divergence_weight if moves else 0.0
        )
        return StepOutput(loss.mean(), metrics)

    return step


def _divergence(
    config: RocmConfig,
    online: OnlineRun,
    batch: PromptBatch,
    sampler: Sampler,
    moves: list[tuple[int, Tensor, Tensor]],
) -> Tensor:
    """Sum the divergences of all stochastic steps, (B,).

    The gradient goes to the policy's outputs and, through the latents it produced, to its earlier
    steps; the reference is evaluated at those latents as a constant.
    """
    parts = []
    for index, latents, output in moves:
        with torch.no_grad(), online.run.reference.active():
            reference = sampler.transition(latents, index)
        parts.append(
            transition_divergence(
                sampler.step(output, latents, index),
                reference,
                online.noise(batch, "step", index),
                divergence=config.divergence,
                reduction=config.reduction,
            )
        )
    return torch.stack(parts).sum(0)
