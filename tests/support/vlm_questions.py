"""Photographs, and pairs of answers about them, for tiny vision-language models."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image
from skimage import data as photographs

from mmalign.types import (
    ImageRef,
    VlmPair,
)

FAMILIES = ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
SIZES = [(60, 40), (30, 70)]


def picture(index: int) -> Image.Image:
    photo = getattr(photographs, ("astronaut", "coffee", "chelsea")[index % 3])()
    width, height = SIZES[index % 2]
    return Image.fromarray(photo).convert("RGB").crop((50, 50, 250, 250)).resize((width, height))


def reference(index: int) -> ImageRef:
    buffer = io.BytesIO()
    picture(index).save(buffer, "PNG")
    return ImageRef(buffer.getvalue(), f"picture {index}")


def make_pair(count: int = 1, **fields: Any) -> VlmPair:
    values: dict[str, Any] = {
        "pair_id": "one",
        "prompt": "What is in the picture?",
        "chosen": "A red circle.",
        "rejected": "A blue square and a circle.",
        "images": tuple(reference(i) for i in range(count)),
        "where": "pairs.jsonl line 1",
    }
    return VlmPair(**{**values, **fields})
