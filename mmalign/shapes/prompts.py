"""The prompt sets of Shapes world: what to train on, and what to be judged on."""

from __future__ import annotations

import random
from typing import Literal

from mmalign.shapes.captions import describe
from mmalign.shapes.scene import sample_scene

PromptSet = Literal["train", "held_out", "stress"]


def prompt_set(name: PromptSet, count: int, seed: int = 0) -> list[str]:
    """Draw `count` distinct prompts.

    Args:
        name: `train` (compositions the models were trained on), `held_out` (compositions never seen
            in any training) or `stress` (four objects, held-out compositions).
        count: number of prompts.
        seed: draws another set of the same kind.
    """
    rng = random.Random(f"{seed}/{name}")
    texts: dict[str, None] = {}
    while len(texts) < count:
        scene = sample_scene(
            rng, held_out=name != "train", num_objects=4 if name == "stress" else None
        )
        texts[describe(scene, rng).text] = None
    return list(texts)
