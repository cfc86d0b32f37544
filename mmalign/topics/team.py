"""Who does which job, made when first needed and let go when no longer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from mmalign.topics.types import (
    AnsweringModel,
    ConsistencyJudge,
    CropSimilarity,
    Labeller,
    QuestionWriter,
    Rewriter,
    Splitter,
)

Worker = TypeVar("Worker")


class Cost(NamedTuple):
    """What a stage asks of models: texts generated, yes/no questions, crops encoded by CLIP."""

    generations: int = 0
    yes_no: int = 0
    crops: int = 0

    def __str__(self) -> str:
        """Say it in words."""
        parts = [
            f"{count:,} {name}"
            for count, name in zip(
                self, ("generations", "yes/no questions", "CLIP crops"), strict=True
            )
            if count
        ]
        return ", ".join(parts) or "no model"


class Job(Generic[Worker]):
    """A job, whoever does it.

    `identity` names who does it and with what options, for the keys of results; `exact` marks those
    that ask no model.
    """

    def __init__(self, identity: str, make: Callable[[], Worker], *, exact: bool = False) -> None:
        """Remember how the worker is made."""
        self.identity, self.exact = identity, exact
        self._make = make
        self._worker: Worker | None = None

    def worker(self) -> Worker:
        """Return the worker, made now if need be."""
        if self._worker is None:
            self._worker = self._make()
        return self._worker

    def release(self) -> None:
        """Let the worker go."""
        self._worker = None


@dataclass(frozen=True, kw_only=True)
class Team:
    """Every job of topic overwriting."""

    answerer: Job[AnsweringModel]
    splitter: Job[Splitter]
    writer: Job[QuestionWriter]
    judge: Job[ConsistencyJudge]
    labeller: Job[Labeller]
    rewriter: Job[Rewriter]
    similarity: Job[CropSimilarity]
    after_release: Callable[[], None] = lambda: None

    def release(self) -> None:
        """Let every worker go but the model that answers, which most stages need."""
        for job in (self.splitter, self.writer, self.judge, self.labeller, self.rewriter):
            job.release()
        self.similarity.release()
        self.after_release()
