"""Diversity by LPIPS: how far an image is from the others of its prompt.

Zhang et al. 2018, "The unreasonable effectiveness of deep features as a perceptual metric".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mmalign.config import as_path
from mmalign.rewards._backbone import Backbone, BackboneName, load_backbone
from mmalign.rewards._weights import load_tensors, to_dtype
from mmalign.scoring import ScorerError
from mmalign.types import InputError, Modality

TAPS: dict[str, tuple[BackboneName, tuple[int, ...]]] = {
    "alex": ("alexnet", (1, 4, 7, 9, 11)),
    "vgg": ("vgg16", (3, 8, 15, 22, 29)),
    "squeeze": ("squeezenet1_1", (1, 4, 7, 9, 10, 11, 12)),
}
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Per channel, of images in [-1, 1]: version 0.1 of the metric."""
TINY = 1e-10


class LpipsReward:
    """Mean LPIPS distance of an image to the other images of the same prompt in the call.

        r(x_i) = 1 / (n - 1) sum_{j != i} d(x_i, x_j)
        d(x, y) = sum_l mean_hw sum_c w_lc (f_lc(x) / |f_l(x)| - f_lc(y) / |f_l(y)|)^2

    f_l are feature maps of AlexNet (5), VGG-16 (5) or SqueezeNet 1.1 (7) and w_l the published
    weights (v0.1, not negative). 0 for equal images. It scores sets: all images of a prompt belong
    into one call, and at least two of them. Images are not resized. Differentiable.
    """

    name = "lpips"
    modality: Modality = "image"
    differentiable = True
    range = (0.0, float("inf"))
    scores_sets = True
    fingerprint = None  # a distance to images that are others next time: never kept in a cache

    def __init__(
        self,
        weights: str,
        backbone: str,
        network: Literal["alex", "vgg", "squeeze"] = "alex",
        dtype: str = "float32",
        device: str = "cpu",
    ) -> None:
        """Load the networks.

        Args:
            weights: the metric's own, `alex.pth`, `vgg.pth` or `squeeze.pth` of version 0.1.
            backbone: torchvision's weights of the classifier, such as `alexnet-owt-7be5be79.pth`.
            network: which of the three.
            dtype: of the weights: float32, float16, bfloat16 or float64.
            device: torch device.

        Raises:
            InputError: if a file is missing, damaged, pickled, or of another network.
        """
        if network not in TAPS:
            raise InputError(f"reward lpips: network {network!r} is not alex, vgg or squeeze")
        name, taps = TAPS[network]
        layers = load_backbone(name, as_path(backbone), taps)
        self.backbone = layers.to(device, to_dtype(dtype))
        self.weights = [w.to(device, to_dtype(dtype)) for w in _linear(as_path(weights), layers)]

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1]; returns (B,) on the images' device.

        Raises:
            ScorerError: if a prompt has one image only.
        """
        groups: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts):
            groups.setdefault(prompt, []).append(index)
        lonely = next((prompt for prompt, rows in groups.items() if len(rows) < 2), None)
        if lonely is not None:
            raise ScorerError(
                f"reward lpips: there is only one image of {lonely[:60]!r} in the batch; diversity "
                "needs two or more: raise the batch size or the number of images per prompt"
            )
        scores = samples.new_zeros(len(samples), dtype=self._accumulator())
        for rows in groups.values():
            places = torch.tensor(rows, device=samples.device)
            distances = self.distances(samples[places])
            scores = scores.index_copy(0, places, distances.sum(1) / (len(rows) - 1))
        return scores

    def distances(self, images: Tensor) -> Tensor:
        """Compute LPIPS between all pairs of images (n, 3, H, W) in [0, 1]; returns (n, n)."""
        weight = self.weights[0]
        x = 2 * images.to(weight.device).to(self._accumulator()) - 1
        shift, scale = (x.new_tensor(v)[:, None, None] for v in (SHIFT, SCALE))
        first, second = torch.triu_indices(len(images), len(images), 1, device=weight.device)
        pairs = x.new_zeros(len(first))
        for weights, features in zip(
            self.weights, self.backbone(((x - shift) / scale).to(weight.dtype)), strict=True
        ):
            unit = features.to(x.dtype)
            unit = unit / (torch.linalg.vector_norm(unit, dim=1, keepdim=True) + TINY)
            pairs = pairs + torch.stack(
                [
                    F.conv2d((unit[i] - unit[j]).square()[None], weights.to(x.dtype)).mean()
                    for i, j in zip(first.tolist(), second.tolist(), strict=True)
                ]
            )
        table = x.new_zeros(len(images), len(images)).index_put((first, second), pairs)
        return (table + table.T).to(images.device)

    def _accumulator(self) -> torch.dtype:
        dtype = self.weights[0].dtype
        return dtype if dtype == torch.float64 else torch.float32


def _linear(path: Path, backbone: Backbone) -> list[Tensor]:
    tensors = load_tensors(path)
    wanted = {
        f"lin{level}.model.1.weight": (1, width, 1, 1)
        for level, width in enumerate(backbone.widths)
    }
    if {name: tuple(value.shape) for name, value in tensors.items()} != wanted:
        raise InputError(
            f"{path} does not hold the weights of LPIPS for this network, lin0.model.1.weight ..."
        )
    return [tensors[name] for name in wanted]
