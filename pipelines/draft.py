"""Train with DRaFT, DRaFT-K or DRaFT-LV (arXiv 2309.17400): a reward's gradient by sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from mmalign.config import DraftConfig
from mmalign.objectives.draft import draft_loss, noised_again
from mmalign.pipelines._online import OnlineRun, PromptBatch, bridged_rewards, train_online
from mmalign.pipelines._training import Step
from mmalign.rollout import Sampler, differentiable_sample
from mmalign.types import InputError, StepOutput


def run(config: DraftConfig) -> None:
    """Train, evaluate and write the run folder.

    Raises:
        InputError: options that contradict each other, a reward without gradient, or unusable
            input.
    """
    steps = config.sampling.num_inference_steps
    if not 1 <= config.backprop_steps <= steps:
        raise InputError(f"backprop_steps: must be in 1..{steps}, got {config.backprop_steps}")
    if config.num_lv_samples and config.backprop_steps != 1:
        raise InputError("num_lv_samples: DRaFT-LV repeats the last step; set backprop_steps to 1")
    train_online(
        config,
        method="draft-lv" if config.num_lv_samples else "draft",
        families=("sd", "sdxl", "lcm"),
        make_step=lambda online: make_step(config, online),
        needs_gradient=True,
    )


def make_step(config: DraftConfig, online: OnlineRun) -> Step:
    """Make the training step."""

    def step(batch: PromptBatch) -> StepOutput:
        sampler = online.sampler(batch)
        clean, taken = differentiable_sample(
            sampler,
            online.noise(batch, "start"),
            lambda index: online.noise(batch, "step", index),
            backprop_steps=config.backprop_steps,
        )
        images = [clean, *_low_variance(config, online, batch, sampler, clean)]
        rewards = bridged_rewards(online, torch.cat(images), batch, config.decode_batch_size)
        divergence = _divergence(online, sampler, taken) if config.kl_weight else None
        loss, metrics = draft_loss(
            rewards.view(len(images), -1), divergence, kl_weight=config.kl_weight
        )
        return StepOutput(loss.mean(), metrics)

    return step


def _low_variance(
    config: DraftConfig, online: OnlineRun, batch: PromptBatch, sampler: Sampler, clean: Tensor
) -> list[Tensor]:
    """Noise the clean latents to the last step again and predict them, n times."""
    last = len(sampler) - 1
    alpha = online.run.adapter.alphas_cumprod[sampler.grid.timesteps[last]]
    found = []
    for number in range(config.num_lv_samples):
        noisy = noised_again(clean, online.noise(batch, "low variance", number), alpha)
        found.append(sampler.transition(noisy, last).pred_x0)
    return found


def _divergence(
    online: OnlineRun, sampler: Sampler, taken: list[tuple[int, Tensor, Tensor]]
) -> Tensor:
    """Average the squared difference between outputs of policy and reference, (B,)."""
    parts = []
    for index, latents, output in taken:
        with torch.no_grad(), online.run.reference.active():
            reference = sampler.output(latents, index)
        parts.append((output - reference).square().flatten(1).mean(1))
    return torch.stack(parts).mean(0)
