"""How answers are drawn, and how yes and no are told apart."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from mmalign.data.images import hash_image
from mmalign.randomness import derive_seed
from mmalign.types import ImageRef, InputError, Question

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


def question_batches(questions: Sequence[Question], size: int) -> Iterator[list[int]]:
    """List places of questions, those with images and those without apart."""
    for wanted in (True, False):
        places = [i for i, question in enumerate(questions) if bool(question.images) is wanted]
        for start in range(0, len(places), size):
            yield places[start : start + size]


def image_key(question: Question) -> Hashable:
    """Tell questions about the same images from others, by files or by objects in memory."""
    return tuple(
        image.data if isinstance(image, ImageRef) else id(image) for image in question.images
    )


def image_batches(questions: Sequence[Question], size: int) -> Iterator[list[int]]:
    """List places of questions, those about the same images one after the other."""
    groups: dict[Hashable, list[int]] = {}
    for place, question in enumerate(questions):
        groups.setdefault(image_key(question), []).append(place)
    ordered = [place for group in groups.values() for place in group]
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def draw_keys(questions: Sequence[Question], seed: int) -> list[int]:
    """Key the draws of each question by itself and by how often it came before."""
    seen: dict[bytes, int] = {}
    keys = []
    for question in questions:
        digest = hashlib.blake2b(question.prompt.encode("utf-8", "surrogatepass"), digest_size=16)
        for image in question.images:
            content = hash_image(image) if isinstance(image, ImageRef) else image.tobytes()
            digest.update(hashlib.blake2b(content, digest_size=16).digest())
        content_key = digest.digest()
        before = seen.get(content_key, 0)
        seen[content_key] = before + 1
        keys.append(derive_seed(seed, content_key.hex(), before, "answer"))
    return keys
