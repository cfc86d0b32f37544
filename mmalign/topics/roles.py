"""The jobs of topic overwriting, done by any model that answers questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmalign.config import GenerationConfig
from mmalign.topics import prompts
from mmalign.topics.facts import first_words, read_list, read_numbered
from mmalign.topics.types import (
    AnsweringModel,
    Aspect,
    Check,
    RewriteRequest,
    Statement,
)
from mmalign.types import Question


@dataclass(frozen=True, kw_only=True)
class ModelSplitter:
    """Asks a model for the facts of an answer, of which it sees `max_words` words."""

    model: AnsweringModel
    generation: GenerationConfig
    max_words: int
    max_facts: int

    def split(self, answers: Sequence[str]) -> list[list[str]]:
        """List the facts of each answer."""
        questions = [Question(prompts.split(first_words(a, self.max_words))) for a in answers]
        replies = self.model.generate(questions, self.generation)
        return [read_list(reply, self.max_facts) for reply in replies]


@dataclass(frozen=True, kw_only=True)
class ModelWriter:
    """Asks a model for all questions about an answer's facts at once.

    A reply with another number of questions than facts counts for nothing: there is no telling
    which question belongs to which fact.
    """

    model: AnsweringModel
    generation: GenerationConfig

    def ask(self, facts: Sequence[Sequence[str]]) -> list[list[str | None]]:
        """Write wh-questions."""
        replies = self._replies([prompts.ask(group) for group in facts])
        return [_lines(reply, len(group)) for reply, group in zip(replies, facts, strict=True)]

    def prompt(self, question: str, fact: str) -> str:
        """Put a wh-question to the model, with the form of the answer."""
        return prompts.resample(question, fact)

    def verify(self, statements: Sequence[Sequence[Statement]]) -> list[list[Check | None]]:
        """Write yes/no questions."""
        replies = self._replies([prompts.verify(group) for group in statements])
        return [
            [_check(line) for line in _lines(reply, len(group))]
            for reply, group in zip(replies, statements, strict=True)
        ]

    def _replies(self, asked: Sequence[str]) -> list[str]:
        return self.model.generate([Question(text) for text in asked], self.generation)


@dataclass(frozen=True, kw_only=True)
class ModelJudge:
    """Asks a model whether two texts are about one topic; its likelier word decides."""

    model: AnsweringModel
    batch_size: int

    def same_topic(self, pairs: Sequence[tuple[str, str]], aspect: Aspect) -> list[bool]:
        """Judge each pair."""
        questions = [Question(prompts.same_topic(a, b, aspect)) for a, b in pairs]
        return [yes > no for yes, no in self.model.yes_no(questions, self.batch_size)]


@dataclass(frozen=True, kw_only=True)
class ModelLabeller:
    """Reads the probabilities of yes and no off a model."""

    model: AnsweringModel
    batch_size: int

    def probabilities(self, questions: Sequence[Question]) -> list[tuple[float, float]]:
        """Return (p_yes, p_no) of each question."""
        return self.model.yes_no(questions, self.batch_size)


@dataclass(frozen=True, kw_only=True)
class ModelRewriter:
    """Asks a model, which sees the picture, to work corrections into an answer."""

    model: AnsweringModel
    generation: GenerationConfig

    def rewrite(self, requests: Sequence[RewriteRequest]) -> list[str]:
        """Return each answer with its facts replaced."""
        questions = [Question(prompts.rewrite(r), r.question.images) for r in requests]
        return [text.strip() for text in self.model.generate(questions, self.generation)]


def _lines(reply: str, count: int) -> list[str | None]:
    lines = read_numbered(reply, count)
    return [None] * count if lines is None else list(lines)


def _check(line: str | None) -> Check | None:
    return None if line is None else Check(f"{line} {prompts.ANSWER_YES_OR_NO}")
