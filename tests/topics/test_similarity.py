"""The test by CLIP: windows, correlations, edges, and the real model on Shapes world."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from mmalign.config import SimilarityConfig
from mmalign.shapes.render import render
from mmalign.shapes.scene import Scene, SceneObject
from mmalign.topics.similarity import (
    ClipSimilarity,
    candidate_edges,
    crop_boxes,
    map_correlations,
    window_offsets,
)
from mmalign.topics.types import Position
from mmalign.types import InputError


def test_the_authors_windows_are_five_by_five() -> None:
    boxes = crop_boxes(80, 160, 0.5, 0.125)
    assert len(boxes) == 25
    assert boxes[:3] == [(0, 0, 40, 80), (10, 0, 50, 80), (20, 0, 60, 80)]
    assert boxes[5] == (0, 20, 40, 100)
    assert boxes[-1] == (40, 80, 80, 160)


@pytest.mark.parametrize("size", [(64, 64), (37, 101), (1, 3), (333, 17)])
def test_windows_stay_inside_and_have_one_size(size: tuple[int, int]) -> None:
    boxes = crop_boxes(*size, 0.3, 0.1)
    assert len({(right - left, bottom - top) for left, top, right, bottom in boxes}) == 1
    assert all(0 <= left < right <= size[0] for left, _, right, _ in boxes)
    assert all(0 <= top < bottom <= size[1] for _, top, _, bottom in boxes)


@pytest.mark.parametrize(("window", "step"), [(0.0, 0.1), (1.1, 0.1), (0.5, 0.0)])
def test_windows_that_make_no_sense(window: float, step: float) -> None:
    with pytest.raises(InputError, match="window must be in"):
        window_offsets(window, step)


def test_correlations_are_pearsons_and_scaling_changes_none() -> None:
    maps = np.random.default_rng(0).normal(size=(6, 25))
    r = map_correlations(maps)
    np.testing.assert_allclose(r, np.corrcoef(maps), atol=1e-12)
    low, high = maps.min(1, keepdims=True), maps.max(1, keepdims=True)
    np.testing.assert_allclose(map_correlations((maps - low) / (high - low)), r, atol=1e-12)


def test_maps_without_variation_correlate_with_nothing() -> None:
    maps = np.array([[0.3] * 4, [1.0, 2.0, 3.0, 4.0]])
    np.testing.assert_allclose(map_correlations(maps), [[0, 0], [0, 1]], atol=1e-12)
    assert map_correlations(np.zeros((0, 25))).shape == (0, 0)


def test_edges_join_different_answers_above_the_threshold() -> None:
    facts: dict[Position, str] = {(0, 0): "x", (0, 1): "y", (1, 0): "x", (2, 0): "z"}
    r = np.array([[1.0, 0.95, 0.9], [0.95, 1.0, 0.2], [0.9, 0.2, 1.0]])
    found = candidate_edges(facts, r, ["x", "y", "z"], threshold=0.9)
    assert found == [(((0, 0), (1, 0)), 1.0), (((0, 1), (1, 0)), 0.95)]


@pytest.fixture(scope="module")
def clip() -> ClipSimilarity:
    return ClipSimilarity(SimilarityConfig(batch_size=7), "cpu")


def picture() -> Image.Image:
    objects = (
        SceneObject(shape="circle", color="red", x=14, y=14, radius=11),
        SceneObject(shape="star", color="blue", x=50, y=50, radius=11),
    )
    return render(Scene(objects=objects, background="white"))


def test_clip_looks_where_the_objects_are(clip: ClipSimilarity) -> None:
    texts = ["a large red circle", "a red circle", "a large blue star"]
    maps = clip.maps(picture(), texts)
    assert maps.shape == (3, 25)
    assert np.abs(maps).max() <= 1 + 1e-6
    r = map_correlations(maps)
    assert r[0, 1] > 0.9 > r[0, 2]
    corner = maps.reshape(3, 5, 5)
    assert corner[0, 0, 0] > corner[0, 4, 4]
    assert corner[2, 4, 4] > corner[2, 0, 0]


def test_crops_in_batches_of_any_size_are_the_same(clip: ClipSimilarity) -> None:
    whole = ClipSimilarity(SimilarityConfig(batch_size=64), "cpu")
    texts = [f"a {color} circle" for color in ("red", "blue", "green", "yellow")] * 3
    np.testing.assert_allclose(clip.maps(picture(), texts), whole.maps(picture(), texts), atol=1e-5)


def test_large_photographs_are_scaled_down_first(
    clip: ClipSimilarity, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = Image.fromarray(data.coffee())
    texts = ["a red circle", "a blue star"]
    small = clip.maps(photo, texts)
    sizes = set()
    embed = type(clip._clip).embed_images

    def noted(self: Any, crops: torch.Tensor) -> torch.Tensor:
        sizes.add(tuple(crops.shape[-2:]))
        return embed(self, crops)

    monkeypatch.setattr(type(clip._clip), "embed_images", noted)
    large = clip.maps(photo.resize((4 * photo.width, 4 * photo.height)), texts)
    assert sizes == {(448, 672)}
    np.testing.assert_allclose(large, small, atol=0.05)


def test_another_world_than_shapes_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("WARNING", logger="mmalign"):
        ClipSimilarity(SimilarityConfig(), "cpu")
    assert "knows nothing of photographs" in caplog.text
    with pytest.raises(InputError, match="neither a folder nor a built-in"):
        ClipSimilarity(SimilarityConfig(clip_model="no-such"), "cpu")
