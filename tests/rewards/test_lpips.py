from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from mmalign.rewards.lpips import LpipsReward
from mmalign.scoring import ScorerError
from mmalign.types import InputError, Reward

from reward_zoo import check_gradients, convolutions, eight_bit  # isort: skip

WIDTHS = {
    "alex": (64, 192, 384, 256, 256),
    "vgg": (64, 128, 256, 512, 512),
    "squeeze": (64, 128, 256, 384, 384, 512, 512),
}
BUILDERS = {
    "alex": torchvision.models.alexnet,
    "vgg": torchvision.models.vgg16,
    "squeeze": torchvision.models.squeezenet1_1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Backbones under torchvision's names and linear weights under those of LPIPS 0.1."""
    folder = tmp_path_factory.mktemp("lpips")
    generator = torch.Generator().manual_seed(0)
    for name, widths in WIDTHS.items():
        network = convolutions(BUILDERS[name])
        state = {f"features.{key}": value for key, value in network.state_dict().items()}
        torch.save({**state, "classifier.6.bias": torch.zeros(3)}, folder / f"{name}_backbone.pth")
        linear = {
            f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator)
            for i, width in enumerate(widths)
        }
        torch.save(linear, folder / f"{name}.pth")
    return folder


def load(folder: Path, network: Any = "alex", **options: Any) -> LpipsReward:
    return LpipsReward(
        str(folder / f"{network}.pth"), str(folder / f"{network}_backbone.pth"), network, **options
    )


def rectified(network: str, layers: list[torch.nn.Module], x: Tensor) -> Iterator[Tensor]:
    """Features at the rectifier before each pooling, and the last.

    AlexNet has no pooling between its last three convolutions, and all of them count.
    """
    for place, layer in enumerate(layers):
        x = layer(x.clone())
        following = layers[place + 1] if place + 1 < len(layers) else None
        pooled = isinstance(following, torch.nn.MaxPool2d)
        if isinstance(layer, torch.nn.ReLU) and (pooled or network == "alex"):
            yield x


def squeezed(state: dict[str, Tensor], x: Tensor) -> Iterator[Tensor]:
    """SqueezeNet 1.1 from the table of its paper, with the weights under torchvision's names.

    Pooling follows the first convolution, fire 3 and fire 5; all of fire 6 to 9 count.
    """

    def convolve(name: str, x: Tensor, **options: int) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options).relu()

    x = convolve("0", x, stride=2)
    yield x
    for block, places in enumerate(((3, 4), (6, 7), (9, 10, 11, 12))):
        x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        for place in places:
            low = convolve(f"{place}.squeeze", x)
            high = convolve(f"{place}.expand3x3", low, padding=1)
            x = torch.cat([convolve(f"{place}.expand1x1", low), high], 1)
            if block == 2 or place == places[-1]:
                yield x


def authors_distance(
    folder: Path, network: str, layers: torch.nn.Sequential, one: Tensor, other: Tensor
) -> float:
    """LPIPS 0.1 from its paper, on unit features."""
    linear = torch.load(folder / f"{network}.pth", weights_only=True)
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    x = torch.stack([(2 * image - 1 - shift) / scale for image in (one, other)])
    squeeze = network == "squeeze"
    found = squeezed(layers.state_dict(), x) if squeeze else rectified(network, list(layers), x)
    total, levels = 0.0, 0
    for level, features in enumerate(found):
        unit = features / features.square().sum(1, keepdim=True).sqrt().clamp_min(1e-10)
        difference = (unit[0] - unit[1]).square().mean((1, 2))
        total += float(difference @ linear[f"lin{level}.model.1.weight"].flatten())
        levels += 1
    assert levels == len(linear)
    return total


@pytest.mark.parametrize("network", WIDTHS)
def test_equals_the_papers_definition(folder: Path, network: str) -> None:
    reward = load(folder, network)
    images = eight_bit(5, 3, 64, 72)
    prompts = ["a", "b", "a", "b", "a"]
    layers = convolutions(BUILDERS[network])
    with torch.no_grad():
        d = {
            (i, j): authors_distance(folder, network, layers, images[i], images[j])
            for i, j in ((0, 2), (0, 4), (2, 4), (1, 3))
        }
    expected = torch.tensor(
        [
            (d[0, 2] + d[0, 4]) / 2,
            d[1, 3],
            (d[0, 2] + d[2, 4]) / 2,
            d[1, 3],
            (d[0, 4] + d[2, 4]) / 2,
        ]
    )
    scores = reward(images, prompts)
    assert isinstance(reward, Reward)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


def test_equal_images_have_no_distance_and_a_finite_gradient(folder: Path) -> None:
    images = torch.zeros(2, 3, 64, 64, requires_grad=True)
    scores = load(folder)(images, ["", ""])
    assert scores.tolist() == [0, 0]
    scores.sum().backward()
    assert images.grad is not None
    assert bool(torch.isfinite(images.grad).all())


@pytest.mark.parametrize("network", WIDTHS)
def test_gradients_reach_the_images(folder: Path, network: str) -> None:
    reward = load(folder, network, dtype="float64")
    side = 32 if network == "vgg" else 64  # VGG is slow, AlexNet needs the larger one
    check_gradients(lambda images: reward(images, ["", ""]), 2, 3, side, side)


def test_half_precision(folder: Path) -> None:
    images = eight_bit(2, 3, 64, 64)
    exact = load(folder)(images, ["", ""])
    half = load(folder, dtype="bfloat16")(images, ["", ""])
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.1, atol=0)


def test_one_image_has_no_diversity(folder: Path) -> None:
    with pytest.raises(ScorerError, match="only one image of 'b' in the batch"):
        load(folder)(eight_bit(3, 3, 64, 64), ["a", "b", "a"])


def test_files_of_other_networks(folder: Path, tmp_path: Path, exploit: Any) -> None:
    alex, vgg = (str(folder / f"{name}_backbone.pth") for name in ("alex", "vgg"))
    with pytest.raises(InputError, match=r"has other shapes of|lacks"):
        LpipsReward(str(folder / "alex.pth"), vgg)
    for name in ("vgg", "squeeze"):
        with pytest.raises(InputError, match="does not hold the weights of LPIPS"):
            LpipsReward(str(folder / f"{name}.pth"), alex)
    with pytest.raises(InputError, match="'resnet' is not alex, vgg or squeeze"):
        LpipsReward(str(folder / "alex.pth"), alex, "resnet")  # type: ignore[arg-type]
    torch.save(exploit, tmp_path / "alex.pth")
    with pytest.raises(InputError, match="pickled objects"):
        LpipsReward(str(tmp_path / "alex.pth"), alex)
    assert not exploit.marker.exists()
