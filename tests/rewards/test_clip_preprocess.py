from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from skimage import data

from mmalign.rewards._clip_preprocess import ClipPreprocess

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "camera")
OFFSET, SCALE = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def photo(name: str) -> Image.Image:
    return Image.fromarray(getattr(data, name)()).convert("RGB")


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def difference(image: Image.Image, config: PreprocessCfg) -> float:
    """Largest difference to open_clip's transform, in levels of 1/255 before normalization."""
    ours = ClipPreprocess.from_open_clip(asdict(config))(as_tensor(image))[0]
    theirs = image_transform_v2(config, is_train=False)(image)
    assert ours.shape == theirs.shape
    std = torch.tensor(config.std)[:, None, None]
    return float(((ours - theirs) * std).abs().max() * 255)


@pytest.mark.parametrize("size", [64, 224, 336, 600])
@pytest.mark.parametrize("name", PHOTOS)
def test_equals_open_clip_on_photographs(name: str, size: int) -> None:
    assert difference(photo(name), PreprocessCfg(size=size, mean=OFFSET, std=SCALE)) <= 1.001


@pytest.mark.parametrize(
    "config",
    [
        PreprocessCfg(size=96, resize_mode="longest", fill_color=128),
        PreprocessCfg(size=(60, 100), resize_mode="longest"),
        PreprocessCfg(size=(60, 100), resize_mode="squash"),
        PreprocessCfg(size=96, interpolation="bilinear"),
        PreprocessCfg(size=(60, 100), interpolation="bilinear"),
        PreprocessCfg(size=(120, 50), resize_mode="shortest"),
    ],
)
def test_equals_open_clip_in_every_mode(config: PreprocessCfg) -> None:
    for name in ("chelsea", "rocket"):
        assert difference(photo(name), config) <= 1.001
        assert difference(photo(name).rotate(90, expand=True), config) <= 1.001


def test_image_of_the_right_size_is_only_normalized() -> None:
    images = torch.rand(2, 3, 16, 16)
    preprocess = ClipPreprocess(size=(16, 16), mean=(0.5,) * 3, std=(0.25,) * 3)
    assert torch.equal(preprocess(images), (images - 0.5) / 0.25)


def test_smooth_path_is_within_rounding_of_the_exact_one() -> None:
    preprocess = ClipPreprocess(size=(224, 224), mean=(0.0,) * 3, std=(1.0,) * 3)
    images = as_tensor(photo("coffee"))
    smooth = preprocess(images.clone().requires_grad_()).detach()
    assert 0 < float((smooth - preprocess(images)).abs().max() * 255) <= 1.0


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_gradients(mode: str) -> None:
    preprocess = ClipPreprocess(size=(5, 4), mean=OFFSET, std=SCALE, resize_mode=mode, fill_color=9)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3, 9, 7, dtype=torch.float64, generator=generator) * 0.4 + 0.3
    assert torch.autograd.gradcheck(preprocess, (images.requires_grad_(),))


def test_half_precision_is_computed_in_float32() -> None:
    preprocess = ClipPreprocess(size=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
    assert preprocess(torch.rand(1, 3, 20, 10).bfloat16()).dtype == torch.float32
