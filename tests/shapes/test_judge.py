from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from mmalign.shapes.captions import describe
from mmalign.shapes.judge import ShapesJudge
from mmalign.shapes.prompts import prompt_set
from mmalign.shapes.render import render
from mmalign.shapes.scene import sample_scene
from mmalign.types import InputError, Reward


def pictures(count: int, seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    rng = random.Random(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    arrays = np.stack([np.asarray(render(scene)) for scene in scenes])
    images = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255
    return images, [describe(scene, rng).text for scene in scenes]


def test_true_prompts_are_correct_and_shuffled_ones_are_not() -> None:
    images, prompts = pictures(30)
    judge = ShapesJudge()
    assert isinstance(judge, Reward)
    assert judge(images, prompts).eq(1).all()
    assert judge.metrics(images, prompts)["correct"].eq(1).all()
    shifted = prompts[1:] + prompts[:1]
    assert judge(images, shifted).mean() < 0.7
    assert judge.metrics(images, shifted)["correct"].mean() < 0.1


def test_verdicts_name_what_is_wrong() -> None:
    images, prompts = pictures(1)
    judge = ShapesJudge()
    assert judge.verdicts(images, prompts) == ["correct"]
    (verdict,) = judge.verdicts(torch.zeros_like(images), prompts)
    assert verdict.startswith("wrong: object 1")
    assert "clean" in verdict


def test_foreign_prompts_are_one_clear_error() -> None:
    images, _ = pictures(1)
    with pytest.raises(InputError, match="not a Shapes world"):
        ShapesJudge()(images, ["a photo of a cat"])


@pytest.mark.parametrize("name", ["train", "held_out", "stress"])
def test_prompt_sets_are_distinct_and_seeded(name: str) -> None:
    prompts = prompt_set(name, 60)  # type: ignore[arg-type]
    assert len(set(prompts)) == 60
    assert prompts == prompt_set(name, 60)  # type: ignore[arg-type]
    assert prompts != prompt_set(name, 60, seed=1)  # type: ignore[arg-type]
