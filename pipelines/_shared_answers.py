"""A vision-language model whose answers the processes of a run share out among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

from mmalign.adapters._answers import draw_keys, image_batches, question_batches
from mmalign.config import GenerationConfig
from mmalign.processes import gather, share, together, world_size
from mmalign.sharding import requested
from mmalign.types import Question, VlmAdapter

T = TypeVar("T")
Places = list[int]


def shared_answers(adapter: VlmAdapter) -> VlmAdapter:
    """Share out what a model is asked, so that all processes together ask it once.

    All of them have to ask the same, and get the answers of one process: what is shared is whole
    batches, and questions whose draws depend on others are not. Where weights are divided every
    process answers everything, because all have to run as many forwards.
    """
    if world_size() == 1 or requested():
        return adapter
    return cast("VlmAdapter", _SharedAnswers(adapter))


class _SharedAnswers:
    """An adapter with `generate` and `yes_no` shared out; the rest is the adapter's own."""

    def __init__(self, adapter: VlmAdapter) -> None:
        self._adapter = adapter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)

    def generate(self, questions: Sequence[Question], config: GenerationConfig) -> list[str]:
        """Answer each question."""
        batches = list(question_batches(questions, config.batch_size))
        if config.temperature > 0 and _drawn_together(questions, batches):
            return together(lambda: self._adapter.generate(questions, config))
        return _shared(batches, questions, lambda part: self._adapter.generate(part, config))

    def yes_no(self, questions: Sequence[Question], batch_size: int) -> list[tuple[float, float]]:
        """Give the probabilities that an answer begins with yes and with no."""
        batches = image_batches(questions, batch_size)
        return _shared(batches, questions, lambda part: self._adapter.yes_no(part, batch_size))


def _shared(
    batches: Iterable[Places],
    questions: Sequence[Question],
    answer: Callable[[list[Question]], Sequence[T]],
) -> list[T]:
    """Answer this process's batches, collect those of the others, and put all in order.

    Raises:
        InputError: of the first process that has one, on all.
    """
    mine = share(list(batches))
    answers = together(lambda: [answer([questions[i] for i in places]) for places in mine])
    found: dict[int, T] = {}
    for part in gather(list(zip(mine, answers, strict=True))):
        for places, values in part:
            found |= zip(places, values, strict=True)
    return [found[i] for i in range(len(questions))]


def _drawn_together(questions: Sequence[Question], batches: Iterable[Places]) -> bool:
    """Tell whether a question was asked before in another batch, which keys its draws."""
    keys = draw_keys(questions, 0)
    return any(
        draw_keys([questions[i] for i in places], 0) != [keys[i] for i in places]
        for places in batches
    )
