"""Small heads on embeddings: chains of linear layers, read from their weights."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

from torch import Tensor, nn

from mmalign.types import InputError


def linear_chain(tensors: Mapping[str, Tensor], where: object, *, relu: bool = False) -> nn.Module:
    """Build the linear layers that `tensors` hold, in the order of the numbers in their names.

    Args:
        tensors: weights and biases of the layers and nothing else.
        where: of the file, for messages.
        relu: put a rectifier between the layers.

    Raises:
        InputError: if the layers do not chain to a single output, or one has no bias.
    """
    names = [name for name in tensors if name.endswith("weight") and tensors[name].ndim == 2]
    names.sort(key=numbers)
    layers = [
        _linear(tensors[name], tensors.get(name.removesuffix("weight") + "bias"), where)
        for name in names
    ]
    widths = [(layer.in_features, layer.out_features) for layer in layers]
    chained = all(left[1] == right[0] for left, right in itertools.pairwise(widths))
    if not layers or not chained or widths[-1][1] != 1 or 2 * len(layers) != len(tensors):
        raise InputError(
            f"{where} is not a chain of linear layers that ends in one output: "
            f"{', '.join(f'{name} {tuple(t.shape)}' for name, t in tensors.items())[:200]}"
        )
    steps: list[nn.Module] = []
    for layer in layers:
        steps += [nn.ReLU(), layer] if relu and steps else [layer]
    return nn.Sequential(*steps).eval().requires_grad_(False)


def numbers(name: str) -> list[int]:
    """List the numbers in the name of a weight, which order layers."""
    return [int(number) for number in re.findall(r"\d+", name)]


def _linear(weight: Tensor, bias: Tensor | None, where: object) -> nn.Linear:
    if bias is None or bias.shape != weight.shape[:1]:
        raise InputError(f"{where}: a layer of shape {tuple(weight.shape)} has no bias")
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data.copy_(weight)
    layer.bias.data.copy_(bias)
    return layer
