from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmalign.scoring import score_in_batches, score_samples, to_scores
from mmalign.types import InputError

NAMES = ["a.png", "b.png", "c.png"]
IMAGES = torch.zeros(3, 3, 2, 2)
IMAGES[1] = 1.0


class FakeReward:
    name = "fake"
    modality = "image"
    differentiable = False
    range = (0.0, 1.0)

    def __init__(self, function: Callable[[Tensor, Any], Any]) -> None:
        self.function = function

    def __call__(self, samples: Tensor, prompts: Any) -> Any:
        return self.function(samples, prompts)


def score(answer: Any) -> Tensor:
    reward: Any = FakeReward(lambda samples, prompts: answer)
    return score_samples(reward, IMAGES, ["", "", ""], NAMES)


@pytest.mark.parametrize(
    "answer",
    [[1, 2, 3], (1.0, 2.0, 3.0), np.array([1, 2, 3]), torch.tensor([1.0, 2, 3]), [[1], [2], [3]]],
)
def test_good_answers(answer: Any) -> None:
    if isinstance(answer, list) and isinstance(answer[0], list):
        answer = torch.tensor(answer)
    assert score(answer).tolist() == [1.0, 2.0, 3.0]


def test_batches_too_large_for_the_memory_are_halved() -> None:
    sizes = []

    def bright(samples: Tensor, prompts: Any) -> Tensor:
        sizes.append(len(samples))
        if len(samples) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")
        return samples.mean((1, 2, 3))

    reward: Any = FakeReward(bright)
    images = IMAGES.clone().requires_grad_()
    scores = score_samples(reward, images, ["", "", ""], NAMES)
    assert scores.tolist() == [0.0, 1.0, 0.0]
    assert sizes == [3, 1, 2, 1, 1]
    scores.sum().backward()
    assert images.grad is not None
    assert images.grad.min() > 0


def test_no_memory_for_a_single_sample_is_named() -> None:
    def fail(samples: Tensor, prompts: Any) -> Tensor:
        if samples.max() == 1:
            raise MemoryError
        return samples.mean((1, 2, 3))

    reward: Any = FakeReward(fail)
    with pytest.raises(InputError, match=r"fake has no memory for b\.png: MemoryError"):
        score_samples(reward, IMAGES, ["", "", ""], NAMES)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0, None, 2.0], r"fake returned None for b\.png"),
        ([1.0, 2.0, float("nan")], r"fake returned nan for c\.png"),
        (torch.tensor([1.0, float("inf"), 2.0]), r"fake returned inf for b\.png"),
        (["high", 1.0, 2.0], r"fake returned 'high' for a\.png"),
        ([1.0, 2.0], r"fake returned 2 instead of 3 scores for a\.png to c\.png"),
        (torch.zeros(2), r"fake returned 2 instead of 3 scores"),
        (torch.zeros(3, 2), r"fake returned 3x2 instead of 3 scores"),
        (torch.tensor(1.0), r"fake returned a single number instead of 3 scores"),
        (None, r"fake returned None for a\.png to c\.png"),
        (7, r"fake returned a int"),
    ],
)
def test_bad_answers_name_the_sample(answer: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        score(answer)


def test_exception_names_the_sample_that_causes_it() -> None:
    def fussy(samples: Tensor, prompts: Any) -> Tensor:
        if bool((samples > 0).any()):
            raise RuntimeError("too bright\nand more")
        return samples.mean((1, 2, 3))

    reward: Any = FakeReward(fussy)
    with pytest.raises(InputError, match=r"failed for b\.png: RuntimeError: too bright$"):
        score_samples(reward, IMAGES, ["", "", ""], NAMES)


def test_counts_must_agree() -> None:
    reward: Any = FakeReward(lambda samples, prompts: [0.0] * len(samples))
    with pytest.raises(InputError, match="3 samples, 2 prompts and 3 names"):
        score_samples(reward, IMAGES, ["", ""])
    with pytest.raises(InputError, match="3 samples but 2 prompts"):
        score_in_batches(reward, IMAGES, ["", ""])


def test_batches_are_joined_in_order_without_gradients() -> None:
    sizes = []

    def mean(samples: Tensor, prompts: Any) -> Tensor:
        sizes.append(len(samples))
        return samples.mean((1, 2, 3))

    images = torch.rand(5, 3, 2, 2, requires_grad=True)
    reward: Any = FakeReward(mean)
    scores = score_in_batches(reward, images, [""] * 5, batch_size=2)
    assert sizes == [2, 2, 1]
    assert not scores.requires_grad
    torch.testing.assert_close(scores, images.detach().mean((1, 2, 3)).double())


def test_gradients_survive_the_check() -> None:
    images = torch.rand(2, 3, 2, 2, requires_grad=True)
    assert to_scores(images.mean((1, 2, 3)), 2).requires_grad
    assert to_scores(list(images.mean((1, 2, 3))), 2).requires_grad
