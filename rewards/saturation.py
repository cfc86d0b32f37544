"""Mean chroma as a reward: a minimal differentiable example."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmalign.types import Modality


class SaturationReward:
    """Mean of max - min over the color channels, 0 (gray) to 1; the prompt is not looked at.

    This is HSV's saturation times its value. The product stays smooth at black, where saturation
    itself does not.
    """

    name = "saturation"
    modality: Modality = "image"
    differentiable = True
    range = (0.0, 1.0)

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1]; returns (B,)."""
        return (samples.amax(1) - samples.amin(1)).mean((1, 2))
