"""The length of an answer as a reward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmalign.hallucination.nouns import count_words
from mmalign.types import InputError, Modality, Response


class LengthReward:
    """Words of an answer, or with limits minus the words that it has too many or too few.

        r = words                                                  without limits
        r = -max(0, words - maximum) - max(0, minimum - words)     with one or two

    Rewards against hallucination are best satisfied by saying nothing, and judges like long
    answers: limits keep both honest.
    """

    name = "length"
    modality: Modality = "text"
    differentiable = False

    def __init__(self, minimum: int | None = None, maximum: int | None = None) -> None:
        """Set the limits.

        Args:
            minimum: words an answer should have at least.
            maximum: words an answer should have at most.

        Raises:
            InputError: for limits that no answer can keep.
        """
        low, high = minimum or 0, float("inf") if maximum is None else maximum
        if low < 0 or high < max(low, 1):
            raise InputError(f"reward length: no answer has {low} to {high} words")
        self._limits = None if minimum is None and maximum is None else (low, high)
        self.range = (0.0, float("inf")) if self._limits is None else (float("-inf"), 0.0)

    def __call__(self, samples: Sequence[Response], prompts: Sequence[str]) -> Tensor:
        """Score answers; returns (B,) in words."""
        words = torch.tensor([float(count_words(sample.text)) for sample in samples])
        if self._limits is None:
            return words
        low, high = self._limits
        return -(words - high).clamp(min=0) - (low - words).clamp(min=0)
