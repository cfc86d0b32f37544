"""A question on its way through the stages, and asking models about many questions at once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mmalign.endpoint import EndpointError
from mmalign.topics.types import Claim, Position
from mmalign.types import ImageRef, InputError, Question

if TYPE_CHECKING:
    from PIL import Image

Task = TypeVar("Task")
Reply = TypeVar("Reply")
Result = dict[str, Any]
"""What a stage found out about a question, as JSON. `dropped` says why it goes no further, and
`lost` counts what was left out of it, by reason."""


@dataclass
class Item:
    """A question about an image, and what each stage found out.

    Attributes:
        id: stable name, unique in a run.
        prompt: the question.
        image: the image, not decoded.
        image_hash: of its encoded bytes, in hexadecimal.
        where: file and row, for messages.
        results: by name of the stage.
        picture: the image decoded, while a stage that looks at it is running.
    """

    id: str
    prompt: str
    image: ImageRef
    image_hash: str
    where: str
    results: dict[str, Result] = field(default_factory=dict)
    picture: Image.Image | None = None

    @property
    def dropped(self) -> str | None:
        """Why the question goes no further, or None."""
        return next((r["dropped"] for r in self.results.values() if "dropped" in r), None)

    def ask(self, prompt: str | None = None) -> Question:
        """Ask something about the image; the question itself when nothing else is given."""
        if self.picture is None:
            raise ValueError(f"{self.id}: the image is not decoded in this stage")
        return Question(self.prompt if prompt is None else prompt, (self.picture,))


class Batch(Generic[Task]):
    """Tasks of several questions, each different one done once, all at once."""

    def __init__(self) -> None:
        """Begin empty."""
        self._tasks: dict[Hashable, int] = {}
        self._list: list[Task] = []
        self._owners: list[Item] = []

    def add(self, item: Item, task: Task, key: Hashable) -> int:
        """Add a task, unless there is one with this key; returns the place of its reply."""
        place = self._tasks.setdefault(key, len(self._list))
        if place == len(self._list):
            self._list.append(task)
            self._owners.append(item)
        return place

    def run(self, work: Callable[[Sequence[Task]], Sequence[Reply]]) -> Sequence[Reply]:
        """Do all tasks.

        Raises:
            InputError: naming the row, if an endpoint fails, or replies are missing.
        """
        if not self._list:
            return []
        try:
            replies = work(self._list)
        except EndpointError as error:
            if error.index is None:
                raise
            raise InputError(f"{self._owners[error.index].where}: {error}") from error
        if len(replies) != len(self._list):
            raise InputError(
                f"{self._owners[0].where}: {len(replies)} replies to {len(self._list)} tasks"
            )
        return replies


def facts_of(item: Item) -> dict[Position, str]:
    """List the facts that are used, after `verify`."""
    answers = item.results["verify"]["facts"]
    return {(k, f): fact["text"] for k, facts in enumerate(answers) for f, fact in enumerate(facts)}


def claims_of(item: Item) -> dict[int, list[Claim]]:
    """Put facts and scores of the usable answers together, after `score`."""
    claims: dict[int, list[Claim]] = {}
    answers = zip(item.results["verify"]["facts"], item.results["score"]["scores"], strict=True)
    for number, (facts, scores) in enumerate(answers):
        if facts:
            claims[number] = [
                Claim(
                    fact["text"],
                    score_of(score["fact"]),
                    tuple(
                        (text, score_of(pair))
                        for (text, _), pair in zip(
                            fact["resampled"], score["resampled"], strict=True
                        )
                    ),
                )
                for fact, score in zip(facts, scores, strict=True)
            ]
    return claims


def score_of(probabilities: Sequence[float]) -> float:
    """S = p(right) - p(wrong)."""
    return float(probabilities[0]) - float(probabilities[1])
