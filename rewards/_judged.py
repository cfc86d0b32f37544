"""A language model behind a server that rates answers with a number."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mmalign.chat import ChatEndpoint
from mmalign.config import EndpointConfig, GenerationConfig
from mmalign.endpoint import excerpt
from mmalign.scoring import BadScoreError
from mmalign.types import InputError, Modality, Question, Response

_RATING = re.compile(
    r"(?:score|rating)\W{0,12}?(-?\d+(?:\.\d+)?)(?!\d|\.\d|\s*(?:to|-)\s*\d)", re.IGNORECASE
)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
MAX_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class Rating:
    """How a rating is asked for and read.

    Attributes:
        template: what the judge is told, with `{question}`, `{response}` and others in braces.
        low: lowest rating.
        high: highest rating.
        attempts: how often a judge is asked until its reply can be read.
        seed: of the first attempt; the following ones have others.
        shows_images: whether the judge sees the images.
    """

    template: str
    low: float
    high: float
    attempts: int = 3
    seed: int = 0
    shows_images: bool = True


class JudgedReward:
    """The rating that a language model gives to each answer; what `judge` and others share.

    Attributes:
        fingerprint: what a cache of scores takes the server for: the endpoint's `revision`; None,
            without one, keeps no scores.
    """

    modality: Modality = "text"
    differentiable = False
    fingerprint: str | None

    def __init__(self, name: str, endpoint: Mapping[str, Any], rating: Rating) -> None:
        """Check the options; nothing is sent yet.

        Raises:
            InputError: for a missing or unusable address, an option out of range, or a template
                that does not show the answer.
        """
        if not rating.low < rating.high or rating.attempts < 1:
            raise InputError(f"reward {name}: low must be below high, attempts at least 1")
        if "{response}" not in rating.template:
            raise InputError(f"reward {name}: template has no {{response}}")
        self.name, self.range = name, (float(rating.low), float(rating.high))
        self._chat, self._rating = ChatEndpoint(endpoint_config(endpoint, name)), rating
        self.fingerprint = self._chat.config.revision

    def __call__(self, samples: Sequence[Response], prompts: Sequence[str]) -> Tensor:
        """Score answers to questions; returns (B,) between `low` and `high`.

        Raises:
            BadScoreError: the judge gives no rating of an answer, however often it is asked.
            InputError: the server cannot be reached, or a row lacks what the template shows.
        """
        questions = [self._ask(*each) for each in zip(samples, prompts, strict=True)]
        ratings: list[float | None] = [None] * len(questions)
        replies = [""] * len(questions)
        for attempt in range(self._rating.attempts):
            left = [index for index, rating in enumerate(ratings) if rating is None]
            if not left:
                break
            found = self._chat.generate([questions[i] for i in left], self._settings(attempt))
            for index, reply in zip(left, found, strict=True):
                replies[index] = reply
                ratings[index] = read_rating(reply, *self.range)
        for index, rating in enumerate(ratings):
            if rating is None:
                shown = excerpt(replies[index].encode())
                low, high = self.range
                raise BadScoreError(f"got no rating of {low:g} to {high:g}: {shown}", index)
        return torch.tensor(ratings, dtype=torch.float64)

    def _settings(self, attempt: int) -> GenerationConfig:
        """Ask again with a little chance, or the same reply would come."""
        return GenerationConfig(
            max_new_tokens=MAX_TOKENS,
            temperature=0.0 if attempt == 0 else 0.5,
            seed=self._rating.seed + attempt,
        )

    def _ask(self, sample: Response, prompt: str) -> Question:
        values = {"question": prompt, "response": sample.text, **self.evidence(sample)}
        # One pass, so that braces in an answer are text and nothing else.
        text = re.sub(
            r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), self._rating.template
        )
        return Question(text, sample.images if self._rating.shows_images else ())

    def evidence(self, sample: Response) -> dict[str, str]:
        """Return what else the template shows, by name.

        Raises:
            InputError: the row lacks it.
        """
        return {}


def read_rating(reply: str, low: float, high: float) -> float | None:
    """Read the last `Score: 4` or `Rating: 4` of a reply, or else the only number that it has.

    Returns:
        None where there is none, or one that is out of range.
    """
    named = _RATING.findall(reply)
    numbers = named or _NUMBER.findall(reply)
    if not numbers or (not named and len(numbers) > 1):
        return None
    value = float(numbers[-1])
    return value if low <= value <= high else None


def endpoint_config(options: Mapping[str, Any], name: str) -> EndpointConfig:
    """Make the configuration of an endpoint from options of a reward.

    Raises:
        InputError: for an option that it does not have.
    """
    known = [field.name for field in fields(EndpointConfig)]
    for option in options:
        if option not in known:
            nearest = difflib.get_close_matches(str(option), known, n=1, cutoff=0.0)[0]
            raise InputError(
                f"reward {name}: endpoint has no {option!r}: the nearest is {nearest!r}"
            )
    return EndpointConfig(**options)
