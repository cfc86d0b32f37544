"""The Stable-Diffusion-format generator of Shapes world, trained from noise on rendered scenes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from mmalign.shapes.build.autoencoder import encode_scenes
from mmalign.shapes.build.loop import train
from mmalign.shapes.build.scenes import training_scenes
from mmalign.shapes.build.text import WIDTH, tokenize
from mmalign.shapes.captions import describe
from mmalign.shapes.scene import Scene

BATCH = 32
SCENES = 40_000
ENCODE_BATCH = 100
CAPTION_DROPOUT = 0.1


class Stage(NamedTuple):
    """One decay of the learning rate: most is learned while it falls.

    `layout_share` of the timesteps come from the last two fifths of the schedule, where it is
    decided how many objects there are and where.
    """

    name: str
    steps: int
    learning_rate: float
    ema_decay: float
    layout_share: float


STAGES = (
    Stage("generator", 10_000, 1.5e-3, 0.999, 0.0),
    Stage("generator2", 10_000, 1.2e-3, 0.999, 0.0),
    Stage("generator3", 4_500, 1.0e-3, 0.998, 0.5),
    Stage("generator4", 2_200, 6.0e-4, 0.998, 0.25),
)


class LatentScenes:
    """Training scenes with their latents, encoded once; a batch is a pure function of the step."""

    def __init__(self, vae: AutoencoderKL, seed: int, work: Path) -> None:
        """Render and encode `SCENES` scenes, or read them back from `work`."""
        self.seed = seed
        self.scenes: list[Scene] = training_scenes(seed, -2, SCENES)
        file = work / "latents.pt"
        if not file.exists():
            latents = encode_scenes(vae, self.scenes, ENCODE_BATCH)
            torch.save(latents * vae.config.scaling_factor, file)
        self.latents: Tensor = torch.load(file, weights_only=True)

    def batch(self, step: int, size: int, dropout: float) -> tuple[Tensor, list[str]]:
        """Draw latents (size, 4, 16, 16) and their captions, some of them empty."""
        rng = random.Random(f"{self.seed}/batch/{step}")
        chosen = rng.choices(range(len(self.scenes)), k=size)
        captions = [
            "" if rng.random() < dropout else describe(self.scenes[index], rng).text
            for index in chosen
        ]
        return self.latents[chosen], captions


def new_unet(guidance_embedding: int | None = None) -> UNet2DConditionModel:
    """Make an untrained UNet; with `guidance_embedding` one that takes a guidance embedding."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=8,
        time_cond_proj_dim=guidance_embedding,
    )


def new_scheduler() -> DDIMScheduler:
    """Make a DDIM scheduler of Stable Diffusion's betas, ending in pure noise.

    With zero terminal signal-to-noise ratio (Lin et al. 2023, arXiv 2305.08891) the first step of
    sampling sees what training showed it, so that the prompt decides the background; that takes
    v-prediction and trailing timesteps.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def draw_timesteps(
    total: int, count: int, generator: torch.Generator, layout_share: float
) -> Tensor:
    """Draw timesteps (count,), with density falling as t^(-1/3) but for `layout_share` of them.

    Latents are so few that at most timesteps only layout and color are left to learn; outlines are
    learned at the low ones.
    """
    timesteps = total * torch.rand(count, generator=generator) ** 1.5
    if layout_share:
        high = total * (1 - 0.4 * torch.rand(count, generator=generator))
        every = round(1 / layout_share)
        timesteps = torch.where(torch.arange(count) % every == 0, high, timesteps)
    return timesteps.long().clamp(max=total - 1)


@torch.no_grad()
def embed(tokenizer: CLIPTokenizer, encoder: CLIPTextModel, captions: list[str]) -> Tensor:
    """Encode captions to (N, L, D)."""
    states: Tensor = encoder(tokenize(tokenizer, captions)).last_hidden_state
    return states


def build_generator(
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    work: Path,
    seed: int,
    stages: Sequence[Stage] = STAGES,
) -> StableDiffusionPipeline:
    """Train the UNet on velocity prediction; autoencoder and text encoder stay as they are.

    Each stage starts from the averaged weights of the one before.
    """
    torch.manual_seed(seed)
    unet, scheduler = new_unet(), new_scheduler()
    data = LatentScenes(vae, seed, work)
    done = 0
    for stage in stages:

        def loss_at(step: int, stage: Stage = stage, done: int = done) -> Tensor:
            number = done + step
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            latents, captions = data.batch(number, BATCH, CAPTION_DROPOUT)
            noise = torch.randn(latents.shape, generator=generator)
            timesteps = draw_timesteps(len(scheduler), BATCH, generator, stage.layout_share)
            noisy = scheduler.add_noise(latents, noise, timesteps)
            target = scheduler.get_velocity(latents, noise, timesteps)
            output = unet(noisy, timesteps, embed(tokenizer, encoder, captions)).sample
            loss: Tensor = F.mse_loss(output, target)
            return loss

        train(
            stage.name,
            unet,
            loss_at,
            steps=stage.steps,
            learning_rate=stage.learning_rate,
            state_file=work / f"{stage.name}.pt",
            ema_decay=stage.ema_decay,
        )
        done += stage.steps
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
