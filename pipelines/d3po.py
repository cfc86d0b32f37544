"""Train with D3PO (arXiv 2311.13231): trajectories from one noise, compared by their images.

Per prompt, K trajectories start from the same noise; the best is paired with the worst, and every
trained sampler step becomes a preference between the latents they drew there. A pair that the
rewards call a tie teaches nothing; a step of nothing but ties is skipped and counted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmalign.config import D3poConfig
from mmalign.diffusion import transition_logratio
from mmalign.objectives.d3po import best_and_worst, dominating_pair
from mmalign.pipelines._online import (
    ALL_TIED,
    OnlineRun,
    PromptBatch,
    drawn_steps,
    mean_metrics,
    stochastic_steps,
    train_online,
    trajectory_loss,
)
from mmalign.pipelines._training import Step
from mmalign.rollout import Sampler, roll_out
from mmalign.types import InputError, LogRatios, StepOutput, Trajectory


class Compared(NamedTuple):
    """Rows of the better and the worse trajectory, (B,), which pairs count, and mean reward."""

    chosen: Tensor
    rejected: Tensor
    decided: Tensor
    reward: Tensor


def run(config: D3poConfig) -> None:
    """Train, evaluate and write the run folder.

    Raises:
        InputError: fewer than two candidates, a deterministic sampler, or unusable input.
    """
    if config.candidates < 2:
        raise InputError(f"candidates: must be at least 2, got {config.candidates}")
    train_online(
        config,
        method="d3po",
        families=("sd", "sdxl", "lcm"),
        make_step=lambda online: make_step(config, online),
        backward=False,
    )


def make_step(config: D3poConfig, online: OnlineRun) -> Step:
    """Make the training step, which back-propagates sampler step by sampler step."""
    usable = stochastic_steps(online)

    def step(batch: PromptBatch) -> StepOutput:
        sampler = online.sampler(batch)
        count = len(batch.prompts)
        trajectories = _sample(config, online, batch, sampler)
        pairs = _compare(config, online, batch, trajectories.latents[-1])
        both = sampler.rows(torch.arange(count).repeat(2))
        rows = torch.cat([pairs.chosen, pairs.rejected])
        steps = drawn_steps(batch, usable, config.train_steps)
        losses, logged = [], []
        for index in steps:
            latents, after = (trajectories.latents[i][rows] for i in (index, index + 1))
            loss, metrics = _step_loss(config, online, both, latents, after, index)
            loss = (loss * pairs.decided).mean()
            online.run.accelerator.backward(loss / len(steps))
            losses.append(loss.detach())
            logged.append(metrics)
        return StepOutput(
            torch.stack(losses).mean(),
            {
                **mean_metrics(logged),
                "reward": pairs.reward,
                "ties": 1 - pairs.decided.mean(),
            },
            idle=None if bool(pairs.decided.any()) else ALL_TIED,
        )

    return step


def _sample(
    config: D3poConfig, online: OnlineRun, batch: PromptBatch, sampler: Sampler
) -> Trajectory:
    """Sample K trajectories per prompt, candidate-major (K * B rows), from one noise each."""
    copies, count = config.candidates, len(batch.prompts)
    start = online.noise(batch, "start").repeat(copies, 1, 1, 1)

    def noise(index: int) -> Tensor:
        return torch.cat([online.noise(batch, "step", index, k) for k in range(copies)])

    return roll_out(sampler.rows(torch.arange(count).repeat(copies)), start, noise)


def _compare(config: D3poConfig, online: OnlineRun, batch: PromptBatch, clean: Tensor) -> Compared:
    copies, count = config.candidates, len(batch.prompts)
    if config.preference == "pareto":
        scores = online.score_each(clean, batch, copies)
        best, worst, decided = dominating_pair(scores)
    else:
        scores = online.score(clean, batch, copies)
        best, worst, decided = best_and_worst(scores)
    columns = torch.arange(count, device=scores.device)
    return Compared(best * count + columns, worst * count + columns, decided.float(), scores.mean())


def _step_loss(
    config: D3poConfig,
    online: OnlineRun,
    sampler: Sampler,
    latents: Tensor,
    after: Tensor,
    index: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of each pair at one sampler step of `[chosen; rejected]` trajectories."""
    with torch.no_grad(), online.run.reference.active():
        reference = sampler.transition(latents, index)
    policy = sampler.transition(latents, index)
    ratio = transition_logratio(after, policy, reference, reduction=config.reduction)
    return trajectory_loss(config, LogRatios(*ratio.chunk(2)))
