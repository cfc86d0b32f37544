"""How answers are drawn, and how yes and no are told apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from mmalign.types import InputError

TINY = 1e-20


class GumbelSampling(transformers.LogitsProcessor):  # type: ignore[misc]
    """Makes greedy decoding draw from the distribution, each row with a generator of its own.

    The arg-max of logits / T + g with g of the standard Gumbel distribution is a draw from
    softmax(logits / T). Tokens outside the nucleus of `top_p` are left out first.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float) -> None:
        """Seed one generator per row."""
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature, self._top_p = temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Turn logits (B, V) into scores whose arg-max is a draw."""
        scaled = nucleus(scores.float() / self._temperature, self._top_p)
        uniform = torch.stack(
            [
                torch.rand(scaled.shape[1], generator=g, dtype=torch.float64)
                for g in self._generators
            ]
        )
        gumbel = -(-(uniform.clamp_min(TINY)).log()).clamp_min(TINY).log()
        return scaled + gumbel.to(scaled)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Keep the fewest likeliest tokens whose probabilities reach `top_p`; the rest get -inf."""
    if top_p >= 1:
        return logits
    ordered, order = logits.sort(dim=1, descending=True)
    before = ordered.softmax(1).cumsum(1) - ordered.softmax(1)
    dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= top_p)
    return logits.masked_fill(dropped, -torch.inf)


def yes_no_tokens(tokenizer: Any, name: str) -> tuple[list[int], list[int]]:
    """Find the tokens that say yes and no: in any case, with or without a space before.

    Raises:
        InputError: the tokenizer has none, because it splits the words.
    """
    found: dict[str, list[int]] = {"yes": [], "no": []}
    vocabulary = sorted(tokenizer.get_vocab().values())
    for token, text in zip(
        vocabulary, tokenizer.batch_decode([[i] for i in vocabulary]), strict=True
    ):
        word = text.strip().lower()
        if word in found:
            found[word].append(token)
    for word, tokens in found.items():
        if not tokens:
            raise InputError(f"{name}: its tokenizer has no token for the word {word!r}")
    return found["yes"], found["no"]
