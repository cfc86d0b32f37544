"""Train with TailorPO (arXiv 2502.01667): two candidates of one step, ranked by predicted images.

At each trained step two next latents are drawn from the same x_t. Which one is preferred is said by
the reward of the clean image that the policy predicts from each; sampling then goes on from one of
them. With guidance (TailorPO-G) the preferred one is first moved up the reward's gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmalign.config import TailorpoConfig
from mmalign.diffusion import Transition
from mmalign.objectives.tailorpo import guided_latents, tailorpo_logratios
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
from mmalign.randomness import keyed_generator
from mmalign.rollout import Sampler
from mmalign.types import InputError, StepOutput


class Candidates(NamedTuple):
    """Preferred and other next latents (B, C, h, w), which pairs count, and mean reward."""

    chosen: Tensor
    rejected: Tensor
    decided: Tensor
    reward: Tensor


def run(config: TailorpoConfig) -> None:
    """Train, evaluate and write the run folder.

    Raises:
        InputError: a deterministic sampler, a reward without gradient under guidance, or unusable
            input.
    """
    guided = config.guidance_step_size > 0
    train_online(
        config,
        method="tailorpo-g" if guided else "tailorpo",
        families=("sd", "sdxl", "lcm"),
        make_step=lambda online: make_step(config, online),
        backward=False,
        needs_gradient=guided,
    )


def make_step(config: TailorpoConfig, online: OnlineRun) -> Step:
    """Make the training step, which back-propagates sampler step by sampler step."""
    usable = [s for s in stochastic_steps(online) if s >= config.first_trained_step]
    if not usable:
        raise InputError(f"first_trained_step: {config.first_trained_step} leaves no step to train")

    def step(batch: PromptBatch) -> StepOutput:
        sampler, latents = online.sampler(batch), online.noise(batch, "start")
        trained = drawn_steps(batch, usable, config.train_steps)
        losses, logged = [], []
        for index in range(trained[-1] + 1):
            if index not in trained:
                with torch.no_grad():
                    move = sampler.transition(latents, index)
                    latents = move.draw(online.noise(batch, "step", index))
                continue
            policy = sampler.transition(latents, index)
            with torch.no_grad(), online.run.reference.active():
                reference = sampler.transition(latents, index)
            pair = _candidates(config, online, batch, sampler, policy, index)
            ratios = tailorpo_logratios(
                pair.chosen, pair.rejected, policy, reference, reduction=config.reduction
            )
            loss, metrics = trajectory_loss(config, ratios)
            loss = (loss * pair.decided).mean()
            online.run.accelerator.backward(loss / len(trained))
            losses.append(loss.detach())
            logged.append({**metrics, "reward": pair.reward, "ties": 1 - pair.decided.mean()})
            latents = _continuation(config, batch, pair, index)
        metrics = mean_metrics(logged)
        idle = ALL_TIED if bool(metrics["ties"] == 1) else None
        return StepOutput(torch.stack(losses).mean(), metrics, idle)

    return step


def _candidates(
    config: TailorpoConfig,
    online: OnlineRun,
    batch: PromptBatch,
    sampler: Sampler,
    policy: Transition,
    index: int,
) -> Candidates:
    """Draw two next latents of a step and rank them."""
    one, two = (policy.draw(online.noise(batch, "step", index, k)).detach() for k in (0, 1))
    both = sampler.rows(torch.arange(len(batch.prompts)).repeat(2))
    with torch.no_grad():
        scores = online.score(_predicted(both, torch.cat([one, two]), index + 1), batch, 2)
    first = (scores[0] >= scores[1]).view(-1, 1, 1, 1)
    chosen, rejected = torch.where(first, one, two), torch.where(first, two, one)
    if config.guidance_step_size > 0:
        chosen = _guided(config, online, batch, sampler, chosen, index + 1)
    decided = (scores[0] != scores[1]).float()
    return Candidates(chosen, rejected, decided, scores.mean())


def _predicted(sampler: Sampler, latents: Tensor, index: int) -> Tensor:
    """Predict the clean latents; after the last step they are clean already."""
    return latents if index == len(sampler) else sampler.transition(latents, index).pred_x0


def _guided(
    config: TailorpoConfig,
    online: OnlineRun,
    batch: PromptBatch,
    sampler: Sampler,
    latents: Tensor,
    index: int,
) -> Tensor:
    """Move latents up the gradient of the reward of the image they predict."""
    leaf = latents.detach().requires_grad_()
    with torch.enable_grad():
        images = online.run.adapter.decode(_predicted(sampler, leaf, index))
        rewards = online.reward(images, batch.prompts, batch.pair_ids)
        # The target only says where up is: the gradient is scaled to the step size.
        target = float(rewards.detach().max()) + 1.0
        return guided_latents(leaf, rewards, target, step_size=config.guidance_step_size)


def _continuation(
    config: TailorpoConfig, batch: PromptBatch, pair: Candidates, index: int
) -> Tensor:
    if config.continuation == "preferred":
        return pair.chosen
    coins = [
        torch.rand(1, generator=keyed_generator(*key, "continue", index)) < 0.5
        for key in batch.keys
    ]
    heads = torch.cat(coins).view(-1, 1, 1, 1).to(pair.chosen.device)
    return torch.where(heads, pair.chosen, pair.rejected)
