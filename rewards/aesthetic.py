"""LAION's aesthetic predictors: a small head on CLIP image embeddings.

Two public layouts are read: the linear head of aesthetic predictor v1, and the multi-layer head of
the improved predictor (`sac+logos+ava1`: 768-1024-128-64-16-1). The latter was trained without
activations between its layers, so it is a chain of linear maps; dropout is off at inference.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from mmalign.config import as_path
from mmalign.rewards._open_clip import load_open_clip
from mmalign.rewards._weights import load_tensors
from mmalign.types import InputError, Modality


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


def load_head(path: Path) -> nn.Sequential:
    """Read a linear or multi-layer head; frozen, float32.

    Raises:
        InputError: if the file is unusable, or its layers do not chain to a single output.
    """
    tensors = load_tensors(path)
    names = [name for name in tensors if name.endswith("weight") and tensors[name].ndim == 2]
    names.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    layers = [
        _linear(tensors[name], tensors.get(name.removesuffix("weight") + "bias")) for name in names
    ]
    widths = [(layer.in_features, layer.out_features) for layer in layers]
    chained = all(left[1] == right[0] for left, right in itertools.pairwise(widths))
    if not layers or not chained or widths[-1][1] != 1 or 2 * len(layers) != len(tensors):
        raise InputError(
            f"aesthetic head {path} is not a chain of linear layers that ends in one output: "
            f"{', '.join(f'{name} {tuple(t.shape)}' for name, t in tensors.items())[:200]}"
        )
    head = nn.Sequential(*layers)
    return head.eval().requires_grad_(False)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data.copy_(weight)
    if bias is not None and bias.shape == layer.bias.shape:
        layer.bias.data.copy_(bias)
    else:
        raise InputError(f"aesthetic head: a layer of shape {tuple(weight.shape)} has no bias")
    return layer
