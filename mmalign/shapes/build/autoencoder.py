"""The autoencoder of Shapes world: 64 x 64 pixels to 16 x 16 x 4 latents.

Three latent channels are held to be the picture's own colors at a quarter of its size, the fourth
is free for outlines: left alone, so small an encoder arranges colors in a way that a small denoiser
is slow to learn. The autoencoder is trained whole first; then, with the latents fixed, the decoder
alone is refined, which needs no new generator and sharpens small stars and triangles.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from tqdm.auto import tqdm

from mmalign.shapes.build.loop import train
from mmalign.shapes.build.scenes import pixels, training_scenes
from mmalign.shapes.scene import Scene

STEPS = 2000
BATCH = 16
KL_WEIGHT = 1e-7  # of the sum over latent dimensions; at 1e-5 color differences collapse
REFINE_STEPS = 6000
LATENT_NOISE = 0.05  # on latents of unit variance: generated ones are not exactly encoded ones
COLOR_WEIGHT = 5.0  # of the squared distance between latents and the colors of the small picture
FREE_WEIGHT = 0.01  # of the squared size of the free channel
OBJECT_WEIGHT = 5.0  # pixels of objects count this much more than the plain background


def build_autoencoder(work: Path, seed: int, steps: int = STEPS) -> AutoencoderKL:
    """Train the autoencoder and set its `scaling_factor` so that latents have unit variance."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        sample_size=64,
        latent_channels=4,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)

    def loss_at(step: int) -> Tensor:
        torch.manual_seed(seed * 1_000_003 + step)
        images = pixels(training_scenes(seed, step, BATCH)).contiguous(
            memory_format=torch.channels_last
        )
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        loss: Tensor = _difference(decoded, images) + KL_WEIGHT * posterior.kl().mean()
        return loss + _arrangement(posterior.mean, images)

    train("autoencoder", vae, loss_at, steps=steps, learning_rate=2e-3, state_file=work / "vae.pt")
    vae.half().float()  # as it is stored, so that latents do not depend on a save in between
    vae.register_to_config(scaling_factor=_unit_variance_factor(vae, seed))
    return vae


def refine_decoder(
    vae: AutoencoderKL, work: Path, seed: int, steps: int = REFINE_STEPS
) -> AutoencoderKL:
    """Train the decoder further on fixed, slightly noisy latents."""
    decoder = nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})

    def loss_at(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        images = pixels(training_scenes(seed + 3, step, BATCH)).contiguous(
            memory_format=torch.channels_last
        )
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mean
        noise = torch.randn(latents.shape, generator=generator)
        noisy = latents + LATENT_NOISE / vae.config.scaling_factor * noise
        return _difference(vae.decode(noisy).sample, images)

    train(
        "decoder", decoder, loss_at, steps=steps, learning_rate=2e-3, state_file=work / "decoder.pt"
    )
    return vae


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, scenes: Sequence[Scene], batch_size: int) -> Tensor:
    """Render scenes and encode them to latents (N, 4, 16, 16), not yet scaled."""
    starts = tqdm(range(0, len(scenes), batch_size), desc="encode scenes")
    return torch.cat(
        [
            vae.encode(pixels(list(scenes[start : start + batch_size]))).latent_dist.mean
            for start in starts
        ]
    )


def _arrangement(latents: Tensor, images: Tensor) -> Tensor:
    """Hold three channels to the colors of the small picture and keep the fourth of that size."""
    colors = F.avg_pool2d(images, images.shape[-1] // latents.shape[-1])
    free = latents[:, 3:].square().mean()
    return COLOR_WEIGHT * F.mse_loss(latents[:, :3], colors) + FREE_WEIGHT * free


def _difference(decoded: Tensor, images: Tensor) -> Tensor:
    """Mean absolute difference with weight on objects."""
    # Objects keep clear of the border, so the corner pixel is background.
    is_object = (images != images[:, :, :1, :1]).any(1, keepdim=True)
    return ((decoded - images).abs() * (1 + (OBJECT_WEIGHT - 1) * is_object)).mean()


@torch.no_grad()
def _unit_variance_factor(vae: AutoencoderKL, seed: int) -> float:
    images = pixels(training_scenes(seed, -1, 256))
    return float(1 / vae.encode(images).latent_dist.mean.std())
