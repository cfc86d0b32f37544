"""What the networks for faces and styles see of photographs, against Pillow and torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from mmalign.rewards import similarity
from mmalign.rewards.similarity import Kind, SimilarityReward

from reward_zoo import PHOTOS, as_tensor, levels, photo  # isort: skip

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Eye(torch.nn.Module):
    """Takes the place of a network and keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen = torch.zeros(0)

    def forward(self, pixels: Tensor) -> Any:
        self.seen = pixels
        return pixels.flatten(1) if pixels.shape[-1] == similarity.SIZE else [pixels]


def seen(
    kind: Kind, image: Image.Image, folder: Path, patch: pytest.MonkeyPatch, **options: Any
) -> Tensor:
    eye = Eye()
    patch.setattr(similarity, "load_iresnet", lambda path: eye)
    patch.setattr(similarity, "load_backbone", lambda name, path, taps: eye)
    Image.new("RGB", (32, 32), "red").save(folder / "reference.png")
    reward = SimilarityReward(str(folder / "reference.png"), kind, "weights.pth", **options)
    with torch.no_grad():
        reward(as_tensor(image), [""])
    return eye.seen


def photographs(name: str) -> list[Image.Image]:
    """A wide one, a tall one, and one of odd sides."""
    image = photo(name)
    return [image, image.rotate(90, expand=True), image.crop((0, 0, 301, 224))]


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize("crop", [1.0, 0.83, 0.7])
def test_faces(name: str, crop: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The square in the middle is cut out, then resized, and becomes (x - 127.5) / 127.5."""
    for image in photographs(name):
        side = round(min(image.size) * crop)
        left, top = ((length - side) // 2 for length in image.size)
        square = image.crop((left, top, left + side, top + side))
        small = square.resize((112, 112), Image.Resampling.BILINEAR)
        expected = (as_tensor(small) * 255 - 127.5) / 127.5
        found = seen("face", image, tmp_path, monkeypatch, crop=crop)
        assert levels(found, expected, (0.5,) * 3) <= 1.001


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize("size", [224, 97])
def test_styles(name: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = transforms.Compose(
        [
            transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    for image in photographs(name):
        found = seen("style", image, tmp_path, monkeypatch, size=size)
        assert levels(found, theirs(image)[None], STD) <= 1.001
