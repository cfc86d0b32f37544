"""The latent consistency student, distilled from Shapes world's own generator."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from mmalign.diffusion import (
    add_noise,
    consistency_function,
    ddim_grid,
    guidance_scale_embedding,
)
from mmalign.objectives.consistency_dpo import pseudo_huber_distance, teacher_step
from mmalign.shapes.build.loop import train
from mmalign.shapes.build.text_to_image import LatentScenes, embed, new_unet

STEPS = 1500
BATCH = 16
GUIDANCE = (1.0, 4.0)
EMBEDDING = 128
TARGET_DECAY = 0.95


def build_student(
    teacher: StableDiffusionPipeline, work: Path, seed: int, steps: int = STEPS
) -> LatentConsistencyModelPipeline:
    """Distil with the latent consistency objective (Luo et al. 2023, arXiv 2310.04378)."""
    torch.manual_seed(seed)
    student = _from_teacher(teacher.unet)
    target = copy.deepcopy(student).requires_grad_(False)
    teacher.unet.requires_grad_(False)
    data = LatentScenes(teacher.vae, seed, work)
    alphas: Tensor = teacher.scheduler.alphas_cumprod
    grid = ddim_grid(alphas)
    schedule: dict[str, Any] = {
        "alphas_cumprod": alphas,
        "prediction_type": teacher.scheduler.config.prediction_type,
    }
    tokenizer, encoder = teacher.tokenizer, teacher.text_encoder
    empty = embed(tokenizer, encoder, [""]).expand(BATCH, -1, -1)

    def predict(unet: UNet2DConditionModel, noisy: Tensor, steps: Tensor, *rest: Tensor) -> Tensor:
        prompt, guidance = rest
        output = unet(noisy, steps, prompt, timestep_cond=guidance).sample
        return consistency_function(output, noisy, steps, **schedule)

    def loss_at(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        latents, captions = data.batch(step, BATCH, dropout=0.0)
        noise = torch.randn(latents.shape, generator=generator)
        index = torch.randint(0, len(grid.timesteps), (BATCH,), generator=generator)
        timesteps = grid.timesteps[index]
        low, high = GUIDANCE
        scale = low + (high - low) * torch.rand(BATCH, generator=generator)
        guidance = guidance_scale_embedding(scale - 1, EMBEDDING)
        noisy = add_noise(latents, noise, timesteps, alphas)
        with torch.no_grad():
            for current, moving in zip(student.parameters(), target.parameters(), strict=True):
                moving.lerp_(current, 1 - TARGET_DECAY)
            prompt = embed(tokenizer, encoder, captions)
            cond, uncond = teacher.unet(
                torch.cat([noisy, noisy]),
                torch.cat([timesteps, timesteps]),
                torch.cat([prompt, empty]),
            ).sample.chunk(2)
            end = teacher_step(cond, uncond, noisy, timesteps, scale, grid=grid, **schedule)
            goal = predict(target, end.next_latents, end.next_timesteps, prompt, guidance)
        guess = predict(student, noisy, timesteps, prompt, guidance)
        return pseudo_huber_distance(guess, goal).mean()

    train(
        "student",
        student,
        loss_at,
        steps=steps,
        learning_rate=5e-4,
        state_file=work / "student.pt",
        ema_decay=0.99,
    )
    return LatentConsistencyModelPipeline(
        vae=teacher.vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=student.eval(),
        scheduler=LCMScheduler.from_config(teacher.scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _from_teacher(teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    """Copy the teacher's weights; only the guidance projection is new."""
    student = new_unet(EMBEDDING)
    missing = student.load_state_dict(teacher.state_dict(), strict=False).missing_keys
    assert missing == ["time_embedding.cond_proj.weight"], missing
    return student
