"""Feature maps of torchvision's image classifiers, from weights in its published layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.squeezenet import Fire

from mmalign.rewards._weights import load_into, load_tensors
from mmalign.types import InputError

BackboneName = Literal["alexnet", "vgg16", "vgg19", "squeezenet1_1"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Per channel of ImageNet, in [0, 1] units."""


class Backbone(nn.Module):
    """The convolutions of a classifier, stopped at some of its layers."""

    def __init__(self, layers: nn.Module, taps: tuple[int, ...]) -> None:
        """Hold the layers up to the last tap."""
        super().__init__()
        assert isinstance(layers, nn.Sequential)
        self.layers: nn.Sequential = layers[: taps[-1] + 1]
        self.taps = taps

    @property
    def widths(self) -> list[int]:
        """Count the channels of the feature map at each tap."""
        return [_width(self.layers[: tap + 1]) for tap in self.taps]

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        """Give the feature maps (B, C, h, w) at the taps one after the other."""
        for place, layer in enumerate(self.layers):
            x = layer(x)
            if place in self.taps:
                yield x


def load_backbone(name: BackboneName, path: Path, taps: tuple[int, ...]) -> Backbone:
    """Load the convolutions of a classifier of torchvision; frozen.

    Args:
        name: the classifier.
        path: its published weights, such as `alexnet-owt-7be5be79.pth`; the classifier's own layers
            may be missing.
        taps: places of layers in `features` whose output is wanted, ascending.

    Raises:
        InputError: if the file is damaged, pickled, or of another network.
    """
    builders: dict[str, Any] = {
        "alexnet": torchvision.models.alexnet,
        "vgg16": torchvision.models.vgg16,
        "vgg19": torchvision.models.vgg19,
        "squeezenet1_1": torchvision.models.squeezenet1_1,
    }
    if name not in builders:
        raise InputError(f"backbone {name!r} is none of {', '.join(builders)}")
    tensors = load_tensors(path)
    features = {
        key.removeprefix("features."): value
        for key, value in tensors.items()
        if key.startswith("features.")
    }
    network = _features(builders[name])
    load_into(network, features, path)
    for layer in network:
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # a tap would be overwritten
    return Backbone(network, taps).eval().requires_grad_(False)


def _features(builder: Any) -> nn.Sequential:
    """Build the convolutions alone: the classifiers are most of these networks."""
    with torch.device("meta"):
        features: nn.Sequential = builder(weights=None).features
    return features.to_empty(device="cpu")


def _width(layers: nn.Sequential) -> int:
    last = next(layer for layer in reversed(layers) if isinstance(layer, nn.Conv2d | Fire))
    parts = (last.expand1x1, last.expand3x3) if isinstance(last, Fire) else (last,)
    return sum(part.weight.shape[0] for part in parts)
