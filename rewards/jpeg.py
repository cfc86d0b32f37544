"""Size of the image as a JPEG file, as a reward: compressibility and incompressibility.

Black et al. 2024, "Training diffusion models with reinforcement learning", section 5.1.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from mmalign.types import InputError, Modality

Direction = Literal["compressibility", "incompressibility"]


class JpegReward:
    """Minus (compressibility) or plus (incompressibility) the file size in kB (1000 bytes).

    The prompt is not looked at. Not differentiable.
    """

    name = "jpeg"
    modality: Modality = "image"
    differentiable = False

    def __init__(self, direction: Direction = "compressibility", quality: int = 95) -> None:
        """Choose the direction and the JPEG quality (1 to 100).

        Raises:
            InputError: for an unknown direction or a quality out of range.
        """
        if direction not in ("compressibility", "incompressibility"):
            raise InputError(
                f"reward jpeg: direction {direction!r} is not compressibility or incompressibility"
            )
        if not 1 <= quality <= 100:
            raise InputError(f"reward jpeg: quality {quality} is not between 1 and 100")
        infinity = float("inf")
        self.sign = 1.0 if direction == "incompressibility" else -1.0
        self.quality = quality
        self.range = (0.0, infinity) if self.sign > 0 else (-infinity, 0.0)

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1]; returns (B,) in kB on the images' device."""
        pixels = (samples.detach().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
        sizes = [self._kilobytes(image) for image in pixels.permute(0, 2, 3, 1)]
        return self.sign * torch.tensor(sizes, device=samples.device)

    def _kilobytes(self, pixels: Tensor) -> float:
        buffer = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(buffer, "JPEG", quality=self.quality)
        return buffer.tell() / 1000
