"""Mean luma as a reward: the smallest differentiable example."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmalign.types import Modality

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in ITU-R BT.601."""


class BrightnessReward:
    """Mean luma of the image, 0 (black) to 1 (white); the prompt is not looked at."""

    name = "brightness"
    modality: Modality = "image"
    differentiable = True
    range = (0.0, 1.0)

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1]; returns (B,)."""
        weights = samples.new_tensor(LUMA)[:, None, None]
        return (samples * weights).sum(1).mean((1, 2))
