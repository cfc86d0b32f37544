from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.config import RewardConfig, SamplingConfig
from mmalign.evaluation import (
    diversity,
    evaluate_models,
    plan,
    sample_images,
)
from mmalign.randomness import derive_seed
from mmalign.types import InputError


def test_diversity() -> None:
    images = torch.zeros(5, 3, 2, 2)
    images[1] = 0.5
    images[2] = 1.0
    images[4, :, 0] = 1.0
    expected_a = (0.5 + 1.0 + 0.5) / 3
    expected_b = math.sqrt(0.5)
    value = diversity(images, ["a", "a", "a", "b", "b"])
    assert value == pytest.approx((expected_a + expected_b) / 2)
    with pytest.raises(InputError, match="two images of one prompt"):
        diversity(images[:2], ["a", "b"])


def test_plan_gives_every_image_its_own_seed() -> None:
    prompts, seeds = plan(["x", "y", "x"], 2, seed=7)
    assert prompts == ["x", "x", "y", "y", "x", "x"]
    assert len(set(seeds)) == 6
    assert seeds[3] == derive_seed(7, "evaluation", "y", 1)
    assert seeds[4] == derive_seed(7, "evaluation", "x", 2)


class FakeAdapter:
    def __init__(self) -> None:
        self.batches: list[int] = []

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: SamplingConfig
    ) -> Tensor:
        self.batches.append(len(prompts))
        return torch.stack([torch.full((3, 2, 2), (seed % 97) / 97) for seed in seeds])


def test_sample_images_in_batches() -> None:
    adapter: Any = FakeAdapter()
    prompts, seeds = plan(["x", "y"], 3, seed=0)
    images = sample_images(adapter, prompts, seeds, SamplingConfig(batch_size=4))
    assert adapter.batches == [4, 2]
    assert images[:, 0, 0, 0].tolist() == pytest.approx([(seed % 97) / 97 for seed in seeds])


class Brightness:
    name = "brightness"
    modality = "image"
    differentiable = True
    range = (0.0, 1.0)

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        return samples.mean((1, 2, 3))


class Judge(Brightness):
    name = "judge"

    def metrics(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"correct": (images.mean((1, 2, 3)) > 0.5).float()}

    def verdicts(self, images: Tensor, prompts: Sequence[str]) -> list[str]:
        return [f"saw {prompt}" for prompt in prompts]


def evaluate(before: list[float], after: list[float], **options: Any) -> Any:
    sides = [
        torch.stack([torch.full((3, 2, 2), value) for value in values])
        for values in (before, after)
    ]
    return evaluate_models(*sides, ["x", "y"], images_per_prompt=2, **options)


def test_evaluate_models() -> None:
    rewards: Any = [(Brightness(), RewardConfig(batch_size=3))]
    judge: Any = Judge()
    result = evaluate([0.1, 0.2, 0.3, 0.6], [0.2, 0.4, 0.9, 0.6], rewards=rewards, judge=judge)
    assert list(result.before) == ["brightness", "judge", "correct", "diversity"]
    assert result.before["brightness"] == pytest.approx(0.3)
    assert result.after["brightness"] == pytest.approx(0.525)
    assert (result.before["correct"], result.after["correct"]) == (0.25, 0.5)
    assert result.before["diversity"] == pytest.approx((0.1 + 0.3) / 2)
    assert result.after["diversity"] == pytest.approx((0.2 + 0.3) / 2)
    assert result.changes["brightness"].value == pytest.approx(0.225)
    assert result.changes["diversity"].value == pytest.approx(0.05)
    assert result.win_rate is not None
    assert (result.win_rate.wins, result.win_rate.losses, result.win_rate.ties) == (3, 0, 1)
    assert result.judge == "judge"
    assert result.verdicts_after[2] == (pytest.approx(0.9), "saw y", True)
    assert result.verdicts_before[0].correct is False


def test_evaluate_models_samples_both_sides_with_the_same_seeds() -> None:
    asked = []

    def sampler(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        asked.append((list(prompts), list(seeds)))
        return torch.rand(len(prompts), 3, 2, 2)

    result = evaluate_models(sampler, sampler, ["x", "y"], images_per_prompt=1, seed=5)
    assert asked[0] == asked[1] == (result.prompts, result.seeds)
    assert result.win_rate is None
    assert result.before == {}


def test_missing_images() -> None:
    with pytest.raises(InputError, match=r"policy has images of shape \(3, 3, 2, 2\) for 4"):
        evaluate([0.0] * 4, [0.0] * 3)
    with pytest.raises(InputError, match="at least one prompt"):
        evaluate_models(torch.zeros(0, 3, 2, 2), torch.zeros(0, 3, 2, 2), [])


def test_bad_reward_names_the_image() -> None:
    class Broken(Brightness):
        def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
            return samples.mean((1, 2, 3)).log()

    rewards: Any = [(Broken(), RewardConfig())]
    with pytest.raises(InputError, match="brightness returned -inf for image 2 of prompt 'y'"):
        evaluate([0.1, 0.2, 0.0, 0.6], [0.2, 0.4, 0.9, 0.6], rewards=rewards)
