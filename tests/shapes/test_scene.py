from __future__ import annotations

import itertools
import math
import random

import pytest

from mmalign.shapes.scene import CANVAS, HELD_OUT_SHARE, Scene, SceneObject, sample_scene


def test_objects_stay_inside_and_apart() -> None:
    rng = random.Random(0)
    for _ in range(300):
        scene = sample_scene(rng)
        for item in scene.objects:
            assert item.radius <= item.x <= CANVAS - item.radius
            assert item.radius <= item.y <= CANVAS - item.radius
        for a, b in itertools.combinations(scene.objects, 2):
            assert math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


@pytest.mark.parametrize("held_out", [True, False])
def test_split_is_respected(held_out: bool) -> None:
    rng = random.Random(1)
    assert all(sample_scene(rng, held_out=held_out).held_out == held_out for _ in range(100))


def test_split_ignores_places_and_order() -> None:
    rng = random.Random(2)
    for _ in range(50):
        scene = sample_scene(rng, num_objects=3)
        moved = tuple(
            SceneObject(shape=o.shape, color=o.color, x=30, y=30, radius=o.radius)
            for o in reversed(scene.objects)
        )
        assert Scene(objects=moved, background="black").held_out == scene.held_out


def test_one_composition_in_eight_is_held_out() -> None:
    rng = random.Random(3)
    scenes = [sample_scene(rng, held_out=None) for _ in range(4000)]
    share = sum(scene.held_out for scene in scenes) / len(scenes)
    assert share == pytest.approx(1 / HELD_OUT_SHARE, abs=0.03)


def test_sampling_is_seeded() -> None:
    assert sample_scene(random.Random(5)) == sample_scene(random.Random(5))
