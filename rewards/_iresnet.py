"""Networks that embed faces, from weights in the layout that insightface publishes.

Deng et al. 2018, "ArcFace" (arXiv 1801.07698): residual blocks of BN, Conv, BN, PReLU, Conv and BN
whose first convolution keeps the size, then BN, FC and BN to 512 numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from mmalign.rewards._weights import load_into, load_tensors
from mmalign.types import InputError

SIZE = 112
"""Height and width of the network's input, in pixels."""
WIDTHS = (64, 128, 256, 512)
DEPTHS = {
    "r18": (2, 2, 2, 2),
    "r34": (3, 4, 6, 3),
    "r50": (3, 4, 14, 3),
    "r100": (3, 13, 30, 3),
}
"""Residual blocks of each stage, by the name of the published network."""


class IResNet(nn.Module):
    """Faces (B, 3, 112, 112), RGB in [-1, 1], to embeddings (B, 512) that are not normalized."""

    def __init__(self, depths: Sequence[int], embedding: int = 512) -> None:
        """Build the network; `depths` are the blocks of each stage."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.prelu = nn.PReLU(WIDTHS[0])
        before = (WIDTHS[0], *WIDTHS)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(
                _Block(inside, width, 2), *(_Block(width, width) for _ in range(depth - 1))
            )
            for inside, width, depth in zip(before, WIDTHS, depths, strict=False)
        )
        self.bn2 = nn.BatchNorm2d(WIDTHS[-1])
        self.fc = nn.Linear(WIDTHS[-1] * (SIZE // 16) ** 2, embedding)
        self.features = nn.BatchNorm1d(embedding)

    def forward(self, faces: Tensor) -> Tensor:
        """Embed faces."""
        x = self.prelu(self.bn1(self.conv1(faces)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        embedded: Tensor = self.features(self.fc(self.bn2(x).flatten(1)))
        return embedded


class _Block(nn.Module):
    def __init__(self, inside: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1:
            shortcut = nn.Conv2d(inside, width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        total: Tensor = self.bn3(self.conv2(inner)) + self.downsample(x)
        return total


def load_iresnet(path: Path) -> IResNet:
    """Load a published network, `backbone.pth` of r18 to r100, by what it holds; frozen.

    Raises:
        InputError: if the file is missing, damaged, pickled, ONNX, or of another network.
    """
    if path.suffix == ".onnx":
        raise InputError(
            f"{path} is ONNX, which has no gradient here: take insightface's PyTorch weights "
            "(backbone.pth of arcface_torch)"
        )
    tensors = load_tensors(path)
    depths = tuple(_depth(tensors, stage) for stage in range(1, 5))
    if depths not in DEPTHS.values():
        raise InputError(
            f"{path} is not a face network of insightface ({', '.join(DEPTHS)}): its stages have "
            f"{', '.join(map(str, depths))} residual blocks"
        )
    network = IResNet(depths)
    counters = {  # of training only; conversions leave them out
        name: value
        for name, value in network.state_dict().items()
        if name.endswith("num_batches_tracked")
    }
    load_into(network, counters | tensors, path)
    return network.eval().requires_grad_(False)


def _depth(tensors: Mapping[str, Tensor], stage: int) -> int:
    """Count the residual blocks of a stage."""
    found = (re.match(rf"layer{stage}\.(\d+)\.", name) for name in tensors)
    return len({match[1] for match in found if match})
