"""Whether two facts are about the same part of a picture, by their similarity to its crops."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mmalign.topics.types import Edge, Position
from mmalign.types import InputError

if TYPE_CHECKING:
    from PIL import Image

    from mmalign.config import SimilarityConfig

Array = NDArray[np.float64]
Box = tuple[int, int, int, int]
LARGEST_SIDE = 1344
"""Larger images are scaled down first: half of one still is twice what CLIP models look at."""

logger = logging.getLogger(__name__)


def window_offsets(window: float, step: float) -> list[float]:
    """List where windows begin along one side, as shares of it: 0, step, ... up to 1 - window.

    Raises:
        InputError: for a window that is not in (0, 1], or a step that is not positive.
    """
    if not 0 < window <= 1 or not step > 0:
        raise InputError(
            f"similarity: window must be in (0, 1] and step positive, got {window:g} and {step:g}"
        )
    count = int((1 - window) / step + 1e-9) + 1
    return [step * index for index in range(count)]


def crop_boxes(width: int, height: int, window: float, step: float) -> list[Box]:
    """Lay windows of one size over a picture, row by row, as (left, top, right, bottom) in pixels.

    0.5 and 0.125 give the authors' 5 x 5.
    """
    offsets = window_offsets(window, step)
    wide, high = max(1, round(window * width)), max(1, round(window * height))
    corners = [
        (min(round(x * width), width - wide), min(round(y * height), height - high))
        for y in offsets
        for x in offsets
    ]
    return [(left, top, left + wide, top + high) for left, top in corners]


def map_correlations(maps: Array) -> Array:
    """Correlate similarity maps (n, crops) with each other; returns Pearson's r (n, n).

    The authors scale each map to [0, 1] first, which changes no correlation. A map without any
    variation has none, and gets r = 0.
    """
    centered = maps - maps.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(centered, axis=1)
    flat = norms <= 1e-12 * np.maximum(1.0, np.abs(maps).max(axis=1, initial=0.0))
    unit = centered / np.where(flat, 1.0, norms)[:, None]
    unit[flat] = 0.0
    correlations: Array = np.clip(unit @ unit.T, -1.0, 1.0)
    return correlations


def candidate_edges(
    facts: Mapping[Position, str], correlations: Array, texts: Sequence[str], threshold: float
) -> list[tuple[Edge, float]]:
    """List pairs of facts of different answers whose maps correlate by more than `threshold`.

    Args:
        facts: text by position.
        correlations: between `texts`, (n, n).
        texts: each different text once.
        threshold: smallest correlation, exclusive.
    """
    row = {text: number for number, text in enumerate(texts)}
    ordered = sorted(facts)
    found = []
    for i, first in enumerate(ordered):
        for second in ordered[i + 1 :]:
            r = float(correlations[row[facts[first]], row[facts[second]]])
            if first[0] != second[0] and r > threshold:
                found.append(((first, second), r))
    return found


class ClipSimilarity:
    """Cosine similarity of texts and crops in an open_clip model."""

    def __init__(self, config: SimilarityConfig, device: str) -> None:
        """Load the model.

        Raises:
            InputError: if the model cannot be loaded, or windows make no sense.
        """
        from mmalign.rewards._open_clip import load_open_clip
        from mmalign.rewards.clip import SHAPES_CLIP

        window_offsets(config.window, config.step)
        if config.clip_model is None:
            logger.warning(
                "similarity: no clip_model given, so Shapes world's own compares, which knows"
                " nothing of photographs; for others set similarity.clip_model, such as"
                " ViT-L-14-336 (clip_pretrained: openai)"
            )
        self._config = config
        self._clip = load_open_clip(
            config.clip_model or SHAPES_CLIP, config.clip_pretrained, device, "fp32"
        )

    def maps(self, image: Image.Image, texts: Sequence[str]) -> Array:
        """Compare each text with each crop; returns (texts, crops)."""
        import torch

        from mmalign.data.images import to_tensor

        if max(image.size) > LARGEST_SIDE:  # whose 25 crops would take gigabytes
            image = image.copy()
            image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        boxes = crop_boxes(*image.size, self._config.window, self._config.step)
        crops = torch.stack([to_tensor(image.crop(box)) for box in boxes])
        size = self._config.batch_size
        parts = [
            slice(start, start + size) for start in range(0, max(len(crops), len(texts)), size)
        ]
        with torch.no_grad():
            pixels = torch.cat([self._clip.embed_images(crops[p]) for p in parts if len(crops[p])])
            words = torch.cat([self._clip.embed_texts(texts[p]) for p in parts if texts[p]])
            similarity = words.double() @ pixels.double().T
        found: Array = similarity.cpu().numpy()
        return found
