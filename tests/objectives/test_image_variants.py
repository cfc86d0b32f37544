from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mmalign.objectives import image_variants
from mmalign.randomness import keyed_generator


def seeded(seed: int = 0) -> torch.Generator:
    return keyed_generator("test", seed)


IMAGE = torch.arange(2 * 3 * 6 * 9, dtype=torch.float32).reshape(2, 3, 6, 9) / 100


def test_reference_numbers_of_the_schedule() -> None:
    signal, noise = image_variants.noise_scales(500)
    assert signal == pytest.approx(0.86302, abs=5e-6)
    assert noise == pytest.approx(0.50517, abs=5e-6)
    assert image_variants.noise_scales(0)[0] == pytest.approx(1, abs=2e-5)
    assert (image_variants.sigmoid_schedule().diff() < 0).all()
    for timestep in (-1, 1000):
        with pytest.raises(ValueError, match="timestep"):
            image_variants.noise_scales(timestep)


@pytest.mark.parametrize("shape", [(3, 40, 50), (5, 3, 20, 20), (60, 100)])
def test_noised_pixels_have_signal_and_noise(shape: tuple[int, ...]) -> None:
    pixels = torch.full(shape, 2.0)
    got = image_variants.noised(pixels, 500, seeded())
    noise = (got - 0.86302 * pixels) / 0.50517
    count = noise.numel()
    assert noise.mean().item() == pytest.approx(0, abs=4 / count**0.5)
    assert noise.std().item() == pytest.approx(1, abs=4 / count**0.5)
    assert torch.equal(got, image_variants.noised(pixels, 500, seeded()))
    assert not torch.equal(got, image_variants.noised(pixels, 500, seeded(1)))


def test_noise_is_the_same_in_every_dtype() -> None:
    wide = image_variants.noised(IMAGE, 500, seeded())
    half = image_variants.noised(IMAGE.bfloat16(), 500, seeded())
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), wide, atol=0.05, rtol=0.02)


@pytest.mark.parametrize(("patch", "patches"), [(1, 54), (3, 6), (4, 6), (14, 1)])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_a_share_of_patches_is_masked(patch: int, patches: int, share: float) -> None:
    got = image_variants.masked(IMAGE, share, patch, seeded())
    changed = (got != IMAGE).any(0).any(0)
    rows = [changed[i : i + patch] for i in range(0, 6, patch)]
    cells = [row[:, j : j + patch] for row in rows for j in range(0, 9, patch)]
    assert len(cells) == patches
    assert sum(bool(cell.any()) for cell in cells) == int(share * patches)
    assert_close(got[:, :, changed], torch.full_like(got[:, :, changed], IMAGE.mean()))
    assert torch.equal(got, image_variants.masked(IMAGE, share, patch, seeded()))


def test_all_channels_lose_the_same_pixels() -> None:
    got = image_variants.masked(IMAGE, 0.5, 1, seeded()) != IMAGE
    assert torch.equal(got, got[:1, :1].expand_as(got))


def test_rows_of_patches_are_masked() -> None:
    patches = torch.arange(40.0).reshape(10, 4)
    got = image_variants.masked_rows(patches, 0.3, seeded())
    gone = (got == patches.mean()).all(1)
    assert gone.sum() == 3
    assert torch.equal(got[~gone], patches[~gone])


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_impossible_shares_are_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        image_variants.masked(IMAGE, share, 1, seeded())
    with pytest.raises(ValueError, match="share"):
        image_variants.cropped(IMAGE, share, 0.5, seeded())
    with pytest.raises(ValueError, match="patch"):
        image_variants.masked(IMAGE, 0.5, 0, seeded())


def test_crops_lie_inside_and_have_the_share() -> None:
    tops = set()
    for seed in range(200):
        box = image_variants.crop_box(480, 640, 0.05, 0.2, seeded(seed))
        assert box.top >= 0
        assert box.left >= 0
        assert box.top + box.height <= 480
        assert box.left + box.width <= 640
        assert 0.045 <= box.height * box.width / (480 * 640) <= 0.21
        assert box.width / box.height == pytest.approx(4 / 3, rel=0.02)
        tops.add(box.top)
    assert min(tops) < 50
    assert max(tops) > 250
    assert image_variants.crop_box(3, 3, 0.01, 0.01, seeded())[2:] == (1, 1)


def test_a_crop_is_enlarged_to_the_size_of_the_image() -> None:
    got = image_variants.cropped(IMAGE, 0.2, 0.2, seeded())
    assert got.shape == IMAGE.shape
    box = image_variants.crop_box(6, 9, 0.2, 0.2, seeded())
    part = IMAGE[..., box.top : box.top + box.height, box.left : box.left + box.width]
    assert part.min() <= got.min() <= got.max() <= part.max()
    assert_close(image_variants.cropped(IMAGE, 1.0, 1.0, seeded()), IMAGE)
    assert_close(image_variants.cropped(IMAGE[0], 0.2, 0.2, seeded()), got[0])


def test_an_absent_image_is_the_mean_colour() -> None:
    got: Tensor = image_variants.absent(IMAGE.double())
    assert got.shape == IMAGE.shape
    assert got.dtype == torch.float64
    assert not got.any()
