"""Variants of an image's pixel values: noised, masked, cropped, absent. Pure tensor functions.

Pixel values are what a processor hands to the vision tower, normalised, in any float dtype: images
(..., C, H, W), or rows of flattened patches (N, D) as Qwen-VL's processors make them. Draws come
from a generator that the caller keys by sample and epoch, so a variant can be made again at any
time, for the policy as for the reference.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


@functools.cache
def sigmoid_schedule() -> Tensor:
    """Compute alpha-bar of the 1000-step schedule with sigmoid betas, (1000,) float64.

    beta_t = sigmoid(u_t) (5e-3 - 1e-5) + 1e-5 with u from -6 to 6: the noise with which VCD, POVID,
    CHiP and TARS' code make an image worse.
    """
    steps = torch.linspace(-6, 6, NUM_TIMESTEPS, dtype=torch.float64)
    betas = steps.sigmoid() * (5e-3 - 1e-5) + 1e-5
    return (1 - betas).cumprod(0)


def noise_scales(timestep: int) -> tuple[float, float]:
    """Return how much of the image and of the noise there is at a step: (.86302, .50517) at 500.

    Raises:
        ValueError: If `timestep` is not in [0, 1000).
    """
    if not 0 <= timestep < NUM_TIMESTEPS:
        raise ValueError(f"timestep must be in [0, {NUM_TIMESTEPS}), got {timestep}")
    alpha = sigmoid_schedule()[timestep].item()
    return math.sqrt(alpha), math.sqrt(1 - alpha)


def noised(pixels: Tensor, timestep: int, generator: torch.Generator) -> Tensor:
    """Noise pixel values of any shape to a step of `sigmoid_schedule`."""
    signal, noise = noise_scales(timestep)
    # Drawn on the CPU in float32: the same noise on every device and in every dtype.
    draw = torch.randn(pixels.shape, generator=generator).to(pixels)
    return signal * pixels + noise * draw


def masked(pixels: Tensor, share: float, patch: int, generator: torch.Generator) -> Tensor:
    """Replace a share of the square patches of an image (..., C, H, W) by its mean value.

    `patch` is their side in pixels; 1 masks single pixels, as OPA-DPO's `random` does, 14 the
    patches of LLaVA-1.5's vision tower. Patches at the lower and right edge may be cut.

    Raises:
        ValueError: If `share` is not in [0, 1] or `patch` is not positive.
    """
    if patch < 1:
        raise ValueError(f"patch must be positive, got {patch}")
    height, width = pixels.shape[-2:]
    rows, columns = math.ceil(height / patch), math.ceil(width / patch)
    grid = _choose(rows * columns, share, generator).view(rows, columns)
    mask = grid.repeat_interleave(patch, 0).repeat_interleave(patch, 1)[:height, :width]
    return torch.where(mask.to(pixels.device), pixels.mean(), pixels)


def masked_rows(patches: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Replace a share of the rows of flattened patches (N, D) by their mean value.

    Raises:
        ValueError: If `share` is not in [0, 1].
    """
    mask = _choose(len(patches), share, generator).to(patches.device)
    return torch.where(mask[:, None], patches.mean(), patches)


def crop_box(
    height: int, width: int, min_share: float, max_share: float, generator: torch.Generator
) -> Box:
    """Draw a part of an image of the same aspect ratio, its share of the area uniform in a range.

    Raises:
        ValueError: If not 0 < min_share <= max_share <= 1.
    """
    if not 0 < min_share <= max_share <= 1:
        raise ValueError(f"crop shares must be in (0, 1], got {min_share} to {max_share}")
    draws = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    side = math.sqrt(min_share + (max_share - min_share) * draws[0])
    rows, columns = max(1, round(side * height)), max(1, round(side * width))
    top, left = int(draws[1] * (height - rows + 1)), int(draws[2] * (width - columns + 1))
    return Box(top, left, rows, columns)


def cropped(
    pixels: Tensor, min_share: float, max_share: float, generator: torch.Generator
) -> Tensor:
    """Cut a random part out of an image (..., C, H, W) and enlarge it to the image's size.

    mDPO's rejected image (Wang et al. 2024, arXiv 2406.11839). Enlarged bilinearly. A processor
    whose output is not an image has to be given the cut image instead, see `crop_box`.

    Raises:
        ValueError: If not 0 < min_share <= max_share <= 1.
    """
    height, width = pixels.shape[-2:]
    box = crop_box(height, width, min_share, max_share, generator)
    part = pixels[..., box.top : box.top + box.height, box.left : box.left + box.width]
    flat = part.reshape(-1, *part.shape[-3:])
    grown = torch.nn.functional.interpolate(
        flat, size=(height, width), mode="bilinear", align_corners=False
    )
    return grown.reshape(pixels.shape)


def absent(pixels: Tensor) -> Tensor:
    """Return zeros: an image of the processor's mean colour, as V-DPO's unconditional input."""
    return torch.zeros_like(pixels)


def _choose(count: int, share: float, generator: torch.Generator) -> Tensor:
    """Mark a share of `count` things, (count,) bool."""
    if not 0 <= share <= 1:
        raise ValueError(f"the masked share must be in [0, 1], got {share}")
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[torch.randperm(count, generator=generator)[: int(count * share)]] = True
    return chosen
