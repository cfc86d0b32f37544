"""The autoencoder of Shapes world: 64 x 64 pixels to 16 x 16 x 4 latents."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from mmalign.shapes.build.loop import train
from mmalign.shapes.build.scenes import pixels, training_scenes

STEPS = 2200
BATCH = 32
KL_WEIGHT = 1e-7  # of the sum over latent dimensions; at 1e-5 color differences collapse
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
        # Objects keep clear of the border, so the corner pixel is background.
        is_object = (images != images[:, :, :1, :1]).any(1, keepdim=True)
        difference = (decoded - images).abs() * (1 + (OBJECT_WEIGHT - 1) * is_object)
        loss: Tensor = difference.mean() + KL_WEIGHT * posterior.kl().mean()
        return loss

    train("autoencoder", vae, loss_at, steps=steps, learning_rate=2e-3, state_file=work / "vae.pt")
    vae.register_to_config(scaling_factor=_unit_variance_factor(vae, seed))
    return vae


@torch.no_grad()
def _unit_variance_factor(vae: AutoencoderKL, seed: int) -> float:
    images = pixels(training_scenes(seed, -1, 256))
    return float(1 / vae.encode(images).latent_dist.mean.std())
