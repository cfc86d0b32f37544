from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.config import RewardConfig
from mmalign.rewards.brightness import BrightnessReward
from mmalign.rewards.combine import CombinedReward, combine_scores, normalize_scores, unique_names
from mmalign.rewards.function import CallableReward
from mmalign.rewards.saturation import SaturationReward
from mmalign.types import InputError, Reward

PROMPTS = ["a", "a", "b", "b"]


def reward(function: Callable[..., object], name: str = "r") -> CallableReward:
    return CallableReward(function, name=name)


def values(*numbers: float, name: str = "r") -> CallableReward:
    return reward(lambda images, prompts: list(numbers), name)


def test_weighted_sum() -> None:
    combined = CombinedReward(
        [
            (values(1, 2, 3, 4, name="x"), RewardConfig(weight=2.0)),
            (values(4, 0, 0, 8, name="y"), RewardConfig(weight=-0.5)),
        ]
    )
    assert isinstance(combined, Reward)
    assert combined(torch.zeros(4, 3, 1, 1), PROMPTS).tolist() == [0.0, 4.0, 6.0, 4.0]


def test_eval_only_is_reported_but_not_summed() -> None:
    combined = CombinedReward(
        [
            (values(1, 2, 3, 4, name="x"), RewardConfig()),
            (values(9, 9, 9, 9, name="y"), RewardConfig(eval_only=True)),
        ]
    )
    details = combined.details(torch.zeros(4, 3, 1, 1), PROMPTS)
    assert details.total.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert details.raw["y"].tolist() == [9.0] * 4
    assert list(details.normalized) == ["x"]


def test_only_eval_only_is_refused() -> None:
    with pytest.raises(InputError, match="every reward is eval_only"):
        CombinedReward([(values(1), RewardConfig(eval_only=True))])
    with pytest.raises(InputError, match="every reward is eval_only"):
        combine_scores({"x": torch.ones(1)}, {"x": RewardConfig(eval_only=True)}, ["a"])


def test_zscore() -> None:
    scores = normalize_scores(torch.tensor([1.0, 2.0, 3.0, 6.0]), PROMPTS, "zscore")
    torch.testing.assert_close(scores, torch.tensor([-2.0, -1.0, 0.0, 3.0]) / math.sqrt(3.5))


def test_prompt_zscore_ignores_the_level_of_a_prompt() -> None:
    scores = normalize_scores(torch.tensor([1.0, 3.0, 100.0, 300.0]), PROMPTS, "prompt_zscore")
    assert scores.tolist() == [-1.0, 1.0, -1.0, 1.0]


@pytest.mark.parametrize("how", ["zscore", "prompt_zscore"])
def test_equal_scores_become_zero(how: str) -> None:
    scores = normalize_scores(torch.full((4,), 0.1), PROMPTS, how)
    assert scores.tolist() == [0.0] * 4


def test_prompt_rank() -> None:
    groups = ["a"] * 4 + ["b"]
    scores = normalize_scores(torch.tensor([5.0, 1.0, 5.0, 9.0, 7.0]), groups, "prompt_rank")
    assert scores.tolist() == pytest.approx([0.5, 0.0, 0.5, 1.0, 0.5])


def test_unknown_normalization() -> None:
    with pytest.raises(InputError, match="unknown normalization 'softmax'"):
        normalize_scores(torch.ones(2), ["a", "a"], "softmax")


def test_gradients_pass_through_sum_and_zscore() -> None:
    combined = CombinedReward(
        [
            (BrightnessReward(), RewardConfig(weight=0.5, normalize="zscore")),
            (SaturationReward(), RewardConfig(weight=2.0)),
        ]
    )
    assert combined.differentiable
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 2, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: combined(x, ["a", "b", "c"]), (images,))


def test_rank_is_not_differentiable() -> None:
    config = RewardConfig(normalize="prompt_rank", weight=3.0)
    combined = CombinedReward([(BrightnessReward(), config)])
    assert not combined.differentiable
    assert combined.range == (0.0, 3.0)


def test_range_adds_up() -> None:
    combined = CombinedReward(
        [
            (BrightnessReward(), RewardConfig(weight=2.0)),
            (SaturationReward(), RewardConfig(weight=-1.0)),
        ]
    )
    assert combined.range == (-1.0, 2.0)


def test_repeated_names_stay_apart() -> None:
    pairs: list[tuple[Reward, RewardConfig]] = [(values(1), RewardConfig()) for _ in range(3)]
    assert unique_names(pairs) == ["r", "r_2", "r_3"]


def test_bad_score_names_reward_and_sample() -> None:
    def broken(images: Tensor, prompts: list[str]) -> list[float]:
        return [1.0, math.nan]

    combined = CombinedReward([(reward(broken, "mine"), RewardConfig())])
    with pytest.raises(InputError, match=r"reward mine returned nan for b\.png"):
        combined.details(torch.zeros(2, 3, 1, 1), ["", ""], ["a.png", "b.png"])


TWO = {"x": torch.tensor([1.0, 3.0, 1.0, 3.0]), "y": torch.tensor([10.0, 10.0, 40.0, 0.0])}


def configs(**more: Any) -> dict[str, RewardConfig]:
    return {"x": RewardConfig(weight=1.0, **more), "y": RewardConfig(weight=2.0)}


def test_zscore_combination_is_the_weighted_sum_of_scores_within_prompts() -> None:
    total = combine_scores(TWO, configs(), PROMPTS, "zscore").total
    assert total.tolist() == [-1.0, 1.0, -1.0 + 2.0, 1.0 - 2.0]


def test_rank_combination_averages_ranks_by_weight() -> None:
    total = combine_scores(TWO, configs(), PROMPTS, "rank").total
    assert total.tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1 / 3])
    combined = CombinedReward(
        [(BrightnessReward(), RewardConfig(weight=3.0)), (SaturationReward(), RewardConfig())],
        "rank",
    )
    assert combined.range == (0.0, 1.0)
    assert not combined.differentiable


def test_gdpo_normalizes_each_within_its_prompt_then_the_sum_over_the_batch() -> None:
    """By hand: the sum of z-scores is [-1, 1, 1, -1], of mean 0 and deviation 1."""
    details = combine_scores(TWO, configs(), PROMPTS, "gdpo")
    assert details.normalized["x"].tolist() == [-1.0, 1.0, -1.0, 1.0]
    assert details.normalized["y"].tolist() == [0.0, 0.0, 1.0, -1.0]
    assert details.total.tolist() == pytest.approx([-1.0, 1.0, 1.0, -1.0])
    # With another weight the sum has another spread, which the last step takes out.
    uneven = {"x": RewardConfig(weight=1.0), "y": RewardConfig(weight=4.0)}
    total = combine_scores(TWO, uneven, PROMPTS, "gdpo").total
    torch.testing.assert_close(total, torch.tensor([-1.0, 1.0, 3.0, -3.0]) / math.sqrt(5))


def test_gdpo_is_that_of_its_authors_but_for_one_factor() -> None:
    """Their steps, with the deviations of a sample and 1e-4 added to them, on groups of three."""
    prompts = ["a", "b", "a", "b", "a", "b"]
    raw = {
        "x": torch.tensor([0.0, 5.0, 1.0, 5.0, 4.0, 5.0], dtype=torch.float64),  # b: all equal
        "y": torch.tensor([0.3, 0.0, 0.1, 1.0, 0.9, 0.0], dtype=torch.float64),
    }
    weights = {"x": RewardConfig(weight=2.0), "y": RewardConfig(weight=0.5)}
    summed = torch.zeros(6, dtype=torch.float64)
    for name, config in weights.items():
        for rows in ([0, 2, 4], [1, 3, 5]):
            group = raw[name][rows]
            advantage = (group - group.mean()) / (group.std(correction=1) + 1e-4)
            summed[rows] += config.weight * advantage
    theirs = (summed - summed.mean()) / (summed.std(correction=1) + 1e-4)
    ours = combine_scores(raw, weights, prompts, "gdpo").total
    torch.testing.assert_close(ours * math.sqrt(5 / 6), theirs, rtol=1e-3, atol=0)
    assert float(ours[1]) < 0 < float(ours[3])


def test_gdpo_keeps_apart_what_the_normalized_sum_confuses() -> None:
    """The paper's example: (0, 1) and (0, 2) of two binary rewards give GRPO the same advantages.

    Prompt a has a sample that wins one reward, prompt b one that wins both.
    """
    raw = {"x": torch.tensor([0.0, 1.0, 0.0, 1.0]), "y": torch.tensor([0.0, 0.0, 0.0, 1.0])}
    plain = {"x": RewardConfig(), "y": RewardConfig()}
    grpo = normalize_scores(raw["x"] + raw["y"], PROMPTS, "prompt_zscore")
    gdpo = combine_scores(raw, plain, PROMPTS, "gdpo").total
    assert grpo[1] == grpo[3]
    assert gdpo[3] == pytest.approx(2 * float(gdpo[1]))


@pytest.mark.parametrize("combine", ["zscore", "rank", "gdpo"])
def test_a_normalization_of_ones_own_is_for_sums(combine: Any) -> None:
    with pytest.raises(InputError, match=f"combine {combine} normalizes every reward itself"):
        combine_scores(TWO, configs(normalize="zscore"), PROMPTS, combine)


def test_unknown_combination() -> None:
    unknown: Any = "product"
    with pytest.raises(InputError, match="unknown combination 'product'"):
        combine_scores(TWO, configs(), PROMPTS, unknown)


def test_rewards_to_watch_run_only_for_who_watches_and_change_nothing() -> None:
    calls = []

    def aside(images: Tensor, prompts: Any) -> list[float]:
        calls.append(len(images))
        assert not images.requires_grad
        return [5.0] * len(images)

    combined = CombinedReward(
        [
            (BrightnessReward(), RewardConfig()),
            (reward(aside, "aside"), RewardConfig(eval_only=True)),
        ]
    )
    images = torch.rand(4, 3, 2, 2, requires_grad=True)
    before = combined(images, PROMPTS)
    assert calls == []
    seen: dict[str, Tensor] = {}
    combined.watch = seen.update
    after = combined(images, PROMPTS)
    assert calls == [4]
    assert torch.equal(before, after)
    assert after.requires_grad
    assert seen["aside"].tolist() == [5.0] * 4
    torch.testing.assert_close(seen["brightness"], before.detach())


def test_memory_that_ends_halves_the_batch_of_the_reward_it_ends_in() -> None:
    sizes = []

    def hungry(images: Tensor, prompts: Any) -> Tensor:
        sizes.append(len(images))
        if len(images) > 2:
            raise MemoryError
        return images.mean((1, 2, 3))

    combined = CombinedReward([(reward(hungry), RewardConfig())])
    images = torch.rand(4, 3, 2, 2)
    torch.testing.assert_close(combined(images, PROMPTS), images.mean((1, 2, 3)))
    combined(images, PROMPTS)
    assert sizes == [4, 2, 2, 2, 2]


def test_memory_that_ends_in_a_gradient_is_one_line() -> None:
    def hungry(images: Tensor, prompts: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    scorer = reward(hungry)
    combined = CombinedReward([(scorer, RewardConfig())])
    images = torch.rand(2, 3, 2, 2, requires_grad=True)
    with pytest.raises(InputError, match=r"runs out of memory on a and 1 more.*decode_batch_size"):
        combined(images, PROMPTS[:2], ["a", "b"])
