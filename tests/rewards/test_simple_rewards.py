from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from mmalign.rewards.brightness import BrightnessReward
from mmalign.rewards.function import CallableReward
from mmalign.rewards.jpeg import JpegReward
from mmalign.rewards.saturation import SaturationReward
from mmalign.types import InputError, Reward

RED, WHITE, BLACK = (
    torch.tensor(color)[:, None, None].expand(3, 4, 4)
    for color in ([1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
)


def test_brightness() -> None:
    scores = BrightnessReward()(torch.stack([RED, WHITE, BLACK]), [""] * 3)
    torch.testing.assert_close(scores, torch.tensor([0.299, 1.0, 0.0]))


def test_saturation() -> None:
    scores = SaturationReward()(torch.stack([RED, WHITE, RED * 0.5]), [""] * 3)
    torch.testing.assert_close(scores, torch.tensor([1.0, 0.0, 0.5]))


@pytest.mark.parametrize("reward", [BrightnessReward(), SaturationReward()])
def test_differentiable_ones_pass_gradcheck(reward: Reward) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 4, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    assert reward.differentiable
    assert torch.autograd.gradcheck(lambda samples: reward(samples, ["", ""]), (images,))


def test_jpeg_is_the_file_size_in_kilobytes() -> None:
    pixels = torch.randint(0, 256, (2, 24, 40, 3), dtype=torch.uint8)
    sizes = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image.numpy()).save(buffer, "JPEG", quality=80)
        sizes.append(len(buffer.getvalue()) / 1000)
    images = pixels.permute(0, 3, 1, 2) / 255
    larger = JpegReward("incompressibility", quality=80)
    smaller = JpegReward("compressibility", quality=80)
    torch.testing.assert_close(larger(images, ["", ""]), torch.tensor(sizes))
    torch.testing.assert_close(smaller(images, ["", ""]), -torch.tensor(sizes))
    assert (larger.range, smaller.range) == ((0.0, float("inf")), (-float("inf"), 0.0))
    assert not larger.differentiable


def test_jpeg_prefers_flat_images_when_compressible() -> None:
    images = torch.stack([torch.zeros(3, 64, 64), torch.rand(3, 64, 64)])
    scores = JpegReward()(images, ["", ""])
    assert scores[0] > scores[1]


@pytest.mark.parametrize("options", [{"direction": "sideways"}, {"quality": 0}])
def test_jpeg_refuses_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match="reward jpeg"):
        JpegReward(**options)  # type: ignore[arg-type]


def lengths(images: torch.Tensor, prompts: list[str]) -> list[int]:
    return [len(prompt) for prompt in prompts]


def test_callable_gets_images_and_prompts() -> None:
    reward = CallableReward(lengths)
    assert isinstance(reward, Reward)
    assert reward.name == "lengths"
    assert reward(torch.zeros(2, 3, 2, 2), ["a", "abc"]).tolist() == [1.0, 3.0]


def test_callable_by_dotted_path() -> None:
    reward = CallableReward("mmalign.rewards.brightness:BrightnessReward.__call__", name="x")
    assert reward.name == "x"
    with pytest.raises(InputError, match="use module:attribute"):
        CallableReward("no.such.module:thing")


def test_callable_keeps_gradients() -> None:
    reward = CallableReward(lambda images, prompts: images.mean((1, 2, 3)), differentiable=True)
    images = torch.rand(2, 3, 2, 2, requires_grad=True)
    reward(images, ["", ""]).sum().backward()
    assert images.grad is not None
    torch.testing.assert_close(images.grad, torch.full_like(images, 1 / 12))
