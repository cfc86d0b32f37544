from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFilter

from mmalign.shapes.parser import parse_image
from mmalign.shapes.render import render
from mmalign.shapes.scene import Scene, sample_scene


def attributes(scene: Scene) -> Counter[tuple[str, str, str]]:
    return Counter((item.shape, item.color, item.size) for item in scene.objects)


def test_rendered_scenes_are_read_back() -> None:
    rng = random.Random(0)
    for _ in range(150):
        scene = sample_scene(rng, held_out=None)
        parsed = parse_image(render(scene))
        assert parsed.valid
        assert parsed.scene.background == scene.background
        assert attributes(parsed.scene) == attributes(scene)


def test_positions_are_within_a_pixel() -> None:
    rng = random.Random(1)
    for _ in range(50):
        scene = sample_scene(rng, num_objects=1, held_out=None)
        (truth,), (found,) = scene.objects, parse_image(render(scene)).scene.objects
        assert found.x == pytest.approx(truth.x, abs=1)
        assert found.y == pytest.approx(truth.y, abs=1)
        assert found.radius == pytest.approx(truth.radius, abs=1)


def test_melted_and_noisy_pictures_are_invalid() -> None:
    rng = random.Random(2)
    scene = sample_scene(rng, num_objects=3)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    assert not parse_image(render(scene).filter(ImageFilter.GaussianBlur(6))).valid
    assert not parse_image(noise).valid


def test_empty_picture_is_invalid() -> None:
    assert not parse_image(Image.new("RGB", (64, 64), "white")).valid


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="64 x 64"):
        parse_image(Image.new("RGB", (32, 32)))
