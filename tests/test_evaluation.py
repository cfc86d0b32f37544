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
    mean_ci,
    plan,
    sample_images,
    win_rate,
)
from mmalign.randomness import derive_seed
from mmalign.types import InputError


def test_win_rate_counts() -> None:
    rate = win_rate([1, 2, 3, 0, 5], [0, 1, 3, 1, 5], list("abcde"))
    assert (rate.n, rate.wins, rate.losses, rate.ties) == (5, 2, 1, 2)
    assert rate.value == pytest.approx(2 / 3)
    assert rate.value_with_ties == pytest.approx(3 / 5)


def test_swapping_sides_mirrors_the_rate() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 40, generator=generator)
    groups = [str(i // 4) for i in range(40)]
    one, other = win_rate(a, b, groups), win_rate(b, a, groups)
    assert one.value == pytest.approx(1 - other.value)
    assert one.ci95 == pytest.approx((1 - other.ci95[1], 1 - other.ci95[0]))


def test_interval_matches_the_binomial_one() -> None:
    wins = torch.tensor([1.0] * 70 + [-1.0] * 30)
    rate = win_rate(wins, torch.zeros(100), [str(i) for i in range(100)], resamples=4000)
    half = 1.96 * math.sqrt(0.7 * 0.3 / 100)
    assert rate.ci95 == pytest.approx((0.7 - half, 0.7 + half), abs=0.015)


def test_interval_is_clustered_by_prompt() -> None:
    """Ten copies of ten outcomes say no more than ten outcomes."""
    outcomes = torch.tensor([1.0] * 7 + [-1.0] * 3)
    single = win_rate(outcomes, torch.zeros(10), [str(i) for i in range(10)])
    copies = win_rate(
        outcomes.repeat_interleave(10), torch.zeros(100), [str(i // 10) for i in range(100)]
    )
    assert copies.ci95 == single.ci95
    assert single.ci95[1] - single.ci95[0] > 0.4


def test_interval_depends_on_the_seed_alone() -> None:
    values = torch.rand(30, generator=torch.Generator().manual_seed(1))
    groups = [str(i) for i in range(30)]
    torch.manual_seed(1)
    first = mean_ci(values, groups, seed=3)
    torch.manual_seed(2)
    assert mean_ci(values, groups, seed=3) == first
    assert mean_ci(values, groups, seed=4).ci95 != first.ci95


def test_nothing_decided() -> None:
    rate = win_rate([1.0, 2.0], [1.0, 2.0], ["a", "b"])
    assert math.isnan(rate.value)
    assert all(map(math.isnan, rate.ci95))
    assert (rate.ties, rate.value_with_ties) == (2, 0.5)


def test_mean_ci() -> None:
    mean = mean_ci([1.0, 2.0, 3.0, 6.0], ["a", "a", "b", "c"])
    assert mean.value == 3.0
    assert mean.ci95[0] < 3.0 < mean.ci95[1]
    assert mean_ci([2.0, 2.0], ["a", "b"]).ci95 == (2.0, 2.0)


@pytest.mark.parametrize(
    ("candidate", "baseline", "groups", "message"),
    [
        ([], [], [], "0 values"),
        ([1.0], [1.0, 2.0], ["a", "b"], "1 values for 2 prompts"),
        ([1.0, math.nan], [1.0, 2.0], ["a", "b"], "value nan for prompt 'b'"),
    ],
)
def test_bad_scores(
    candidate: list[float], baseline: list[float], groups: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        win_rate(candidate, baseline, groups)


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
