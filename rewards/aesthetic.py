"""LAION's aesthetic predictors: a small head on CLIP image embeddings.

Three public layouts are read. One is the linear head of aesthetic predictor v1
(`sa_0_4_vit_*_linear.pth`). Two are multi-layer heads (768-1024-128-64-16-1) of the improved
predictor, v2: `sac+logos+ava1-l14-linearMSE.pth` was trained without activations between its
layers, so it is a chain of linear maps, and `ava+logos-l14-reluMSE.pth` with rectifiers, which
shows in the numbers of its layers. Dropout is off at inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from mmalign.config import as_path
from mmalign.rewards._heads import linear_chain, numbers
from mmalign.rewards._open_clip import load_open_clip
from mmalign.rewards._weights import load_tensors
from mmalign.types import InputError, Modality

RELU_PLACES = {0, 3, 6, 9, 11}
"""Places of the layers among activations and dropout in the head with rectifiers."""


class AestheticReward:
    """Predicted aesthetic rating of an image; the prompt is not looked at.

        r(x) = head(f(x) / |f(x)|)

    Ratings lie nominally between 1 and 10. Differentiable with respect to the image.
    """

    name = "aesthetic"
    modality: Modality = "image"
    differentiable = True
    range = (1.0, 10.0)

    def __init__(
        self,
        head: str,
        model: str = "ViT-L-14",
        pretrained: str | None = "openai",
        precision: str = "fp32",
        device: str = "cpu",
    ) -> None:
        """Load the CLIP model and the head.

        Args:
            head: `.safetensors` or `.pth` file of the head.
            model: CLIP model the head was trained on, in the forms of `ClipReward`.
            pretrained: tag or weight file of a built-in architecture.
            precision: open_clip's precision name.
            device: torch device.

        Raises:
            InputError: if a file is missing or damaged, holds code, or the widths do not fit.
        """
        path = as_path(head)
        self.head = load_head(path).to(device)
        self.clip = load_open_clip(model, pretrained, device, precision)
        width = next(self.head.parameters()).shape[1]
        output = getattr(self.clip.model.visual, "output_dim", width)
        if output != width:
            raise InputError(
                f"aesthetic head {path} reads embeddings of width {width}, {model} makes {output}"
            )

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1]; returns (B,) on the images' device."""
        embeddings = self.clip.embed_images(samples)
        rating: Tensor = self.head(embeddings.to(next(self.head.parameters()).dtype))
        return rating[:, 0].to(samples.device)


def load_head(path: Path) -> nn.Module:
    """Read a linear or multi-layer head; frozen, float32.

    Raises:
        InputError: if the file is unusable, or its layers do not chain to a single output.
    """
    tensors = load_tensors(path)
    places = {numbers(name)[-1] for name in tensors if numbers(name)}
    return linear_chain(tensors, f"aesthetic head {path}", relu=places == RELU_PLACES)
