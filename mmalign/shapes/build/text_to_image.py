"""The Stable-Diffusion-format generator of Shapes world, trained from noise on rendered scenes."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mmalign.shapes.build.loop import train
from mmalign.shapes.build.scenes import pixels, training_scenes
from mmalign.shapes.build.tokenizer import CONTEXT
from mmalign.shapes.captions import describe
from mmalign.shapes.scene import Scene

STEPS = 6000
BATCH = 32
SCENES = 40_000
WIDTH = 64
CAPTION_DROPOUT = 0.1
MIN_SNR_GAMMA = 5.0


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


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Make an untrained CLIP text model over `tokenizer`."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet(guidance_embedding: int | None = None) -> UNet2DConditionModel:
    """Make an untrained UNet; with `guidance_embedding` one that takes a guidance embedding."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(48, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
        time_cond_proj_dim=guidance_embedding,
    )


def new_scheduler() -> DDIMScheduler:
    """Make the DDIM scheduler of Stable Diffusion 1.5."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def embed(tokenizer: CLIPTokenizer, encoder: CLIPTextModel, captions: list[str]) -> Tensor:
    """Encode captions to (N, L, D)."""
    tokens = tokenizer(
        captions, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt"
    )
    states: Tensor = encoder(tokens.input_ids).last_hidden_state
    return states


def build_generator(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, work: Path, seed: int, steps: int = STEPS
) -> StableDiffusionPipeline:
    """Train UNet and text encoder together on noise prediction with min-SNR weights."""
    torch.manual_seed(seed)
    encoder, unet, scheduler = new_text_encoder(tokenizer), new_unet(), new_scheduler()
    data = LatentScenes(vae, seed, work)
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    weights = snr.clamp(max=MIN_SNR_GAMMA) / snr

    def loss_at(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        latents, captions = data.batch(step, BATCH, CAPTION_DROPOUT)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(0, len(scheduler), (BATCH,), generator=generator)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        prediction = unet(noisy, timesteps, embed(tokenizer, encoder, captions)).sample
        error = F.mse_loss(prediction, noise, reduction="none").mean((1, 2, 3))
        loss: Tensor = (error * weights[timesteps]).mean()
        return loss

    train(
        "generator",
        nn.ModuleDict({"unet": unet, "text_encoder": encoder}),
        loss_at,
        steps=steps,
        learning_rate=1.5e-3,
        state_file=work / "generator.pt",
        ema_decay=0.999,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
