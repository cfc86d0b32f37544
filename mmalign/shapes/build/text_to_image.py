"""The Stable-Diffusion-format generator of Shapes world, trained from noise on rendered scenes."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from mmalign.shapes.build.loop import train
from mmalign.shapes.build.scenes import pixels, training_scenes
from mmalign.shapes.build.text import WIDTH, tokenize
from mmalign.shapes.captions import describe
from mmalign.shapes.scene import Scene

STEPS = 10_000
BATCH = 32
SCENES = 40_000
CAPTION_DROPOUT = 0.1


class LatentScenes:
    """Training scenes with their latents, encoded once; a batch is a pure function of the step."""

    def __init__(self, vae: AutoencoderKL, seed: int, work: Path) -> None:
        """Render and encode `SCENES` scenes, or read them back from `work`."""
        self.seed = seed
        self.scenes: list[Scene] = training_scenes(seed, -2, SCENES)
        file = work / "latents.pt"
        if not file.exists():
            torch.save(self._encode(vae), file)
        self.latents: Tensor = torch.load(file, weights_only=True)

    @torch.no_grad()
    def _encode(self, vae: AutoencoderKL) -> Tensor:
        parts = []
        for start in tqdm(range(0, len(self.scenes), 100), desc="encode scenes"):
            posterior = vae.encode(pixels(self.scenes[start : start + 100])).latent_dist
            parts.append(posterior.mean * vae.config.scaling_factor)
        return torch.cat(parts)

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


def draw_timesteps(total: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw timesteps (count,) with density falling as t^(-1/3).

    Latents are so few that at most timesteps only layout and color are left to learn; outlines are
    learned at the low ones.
    """
    return (total * torch.rand(count, generator=generator) ** 1.5).long()


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
    steps: int = STEPS,
) -> StableDiffusionPipeline:
    """Train the UNet on velocity prediction; autoencoder and text encoder stay as they are."""
    torch.manual_seed(seed)
    unet, scheduler = new_unet(), new_scheduler()
    data = LatentScenes(vae, seed, work)

    def loss_at(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        latents, captions = data.batch(step, BATCH, CAPTION_DROPOUT)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = draw_timesteps(len(scheduler), BATCH, generator)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = scheduler.get_velocity(latents, noise, timesteps)
        output = unet(noisy, timesteps, embed(tokenizer, encoder, captions)).sample
        loss: Tensor = F.mse_loss(output, target)
        return loss

    train(
        "generator",
        unet,
        loss_at,
        steps=steps,
        learning_rate=1.5e-3,
        state_file=work / "generator.pt",
        ema_decay=0.999,
    )
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
