"""Batches of rewards that score a sample against the others of its prompt."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mmalign.scoring import BatchedReward, divide, score_in_batches, score_samples
from mmalign.types import InputError, Response


class Distance:
    """How far a sample's mean is from the mean of all samples of its prompt in the call."""

    name = "distance"
    modality = "image"
    differentiable = True
    range = (0.0, 1.0)
    scores_sets = True

    def __init__(self, most: int = 10**9) -> None:
        self.most = most
        self.calls: list[list[str]] = []

    def __call__(self, samples: Any, prompts: Sequence[str]) -> Tensor:
        self.calls.append(list(prompts))
        if len(prompts) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if isinstance(samples, Tensor):
            means = samples.mean((1, 2, 3))
        else:
            means = torch.tensor([float(len(sample.text)) for sample in samples])
        same = torch.tensor([[float(a == b) for a in prompts] for b in prompts])
        return (means - (same @ means) / same.sum(1)).abs()


PROMPTS = ["a", "b", "a", "c", "b", "a", "a", "c", "a"]
IMAGES = torch.rand(9, 3, 2, 2, generator=torch.Generator().manual_seed(0))
TRUTH = Distance()(IMAGES, PROMPTS)


@pytest.mark.parametrize("size", [1, 2, 4, 7, 9, None])
def test_prompts_are_never_cut_and_scores_keep_their_order(size: int | None) -> None:
    reward: Any = Distance()
    assert_close(BatchedReward(reward, size)(IMAGES, PROMPTS), TRUTH)
    for prompt in "abc":
        assert sum(prompt in call for call in reward.calls) == 1
    larger = max((len(call) for call in reward.calls if len(set(call)) > 1), default=0)
    assert larger <= (size or 9)
    assert_close(score_in_batches(reward, IMAGES, PROMPTS, batch_size=size or 9), TRUTH.double())


def test_division() -> None:
    assert divide(PROMPTS, 4, whole=False) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert divide(PROMPTS, 4, whole=True) == [[0, 2, 5, 6, 8], [1, 4, 3, 7]]
    assert divide(PROMPTS, None, whole=True) == [[0, 2, 5, 6, 8, 1, 4, 3, 7]]
    assert divide(PROMPTS, 2, whole=True, rows=[1, 3, 4]) == [[1, 4], [3]]
    assert divide([], 2, whole=True) == divide([], None, whole=False) == []


def test_gradients_keep_their_order() -> None:
    gradients = []
    for size in (None, 3):
        images = IMAGES.clone().requires_grad_()
        reward: Any = Distance()
        (BatchedReward(reward, size)(images, PROMPTS) * torch.arange(9)).sum().backward()
        assert images.grad is not None
        gradients.append(images.grad)
    assert_close(*gradients)


def test_memory_divides_between_prompts_with_the_same_result(
    caplog: pytest.LogCaptureFixture,
) -> None:
    reward: Any = Distance(most=5)
    with caplog.at_level(logging.WARNING):
        assert_close(BatchedReward(reward)(IMAGES, PROMPTS), TRUTH)
    assert [len(call) for call in reward.calls] == [9, 5, 4]
    assert "out of memory with 9 samples at a time; going on with 4" in caplog.text


def test_a_prompt_too_large_for_memory_is_named_and_not_halved() -> None:
    reward: Any = Distance(most=4)
    with pytest.raises(
        InputError, match=r"out of memory on the 5 samples of 'a', which it"
    ) as info:
        BatchedReward(reward)(IMAGES, PROMPTS)
    assert "\n" not in str(info.value)
    assert min(len(call) for call in reward.calls) == 5


def test_a_failing_set_is_not_asked_sample_by_sample() -> None:
    calls = []

    def fail(samples: Tensor, prompts: Sequence[str]) -> Tensor:
        calls.append(len(samples))
        raise RuntimeError("no")

    reward: Any = Distance()
    reward.__class__ = type("Failing", (Distance,), {"__call__": staticmethod(fail)})
    with pytest.raises(InputError, match=r"failed for x\.png to z\.png: RuntimeError: no"):
        score_samples(reward, IMAGES[:3], ["a"] * 3, ["x.png", "y.png", "z.png"])
    assert calls == [3]


def test_answers_are_divided_like_images() -> None:
    reward: Any = Distance()
    answers = [Response(text="a" * length) for length in range(9)]
    expected = Distance()(answers, PROMPTS)
    assert_close(BatchedReward(reward, 2)(answers, PROMPTS), expected)
