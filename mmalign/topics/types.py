"""The words of topic overwriting: facts, candidates, edits, and the jobs that models do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from mmalign.config import GenerationConfig
    from mmalign.types import Question

Position = tuple[int, int]
"""A fact: number of its answer, number of the fact in it, both from 0."""
Edge = tuple[Position, Position]
CandidateKind = Literal["raw", "resampled"]
Aspect = Literal["fact", "question"]


class Statement(NamedTuple):
    """Something that may be true of the picture: a fact, or the answer to a question about it."""

    text: str
    question: str | None = None


class Check(NamedTuple):
    """A yes/no question; `affirms` tells whether yes means that the statement is true."""

    question: str
    affirms: bool = True


class Claim(NamedTuple):
    """A fact of an answer, with the score of itself and of the answers to its own question.

    Scores are S = p(yes) - p(no), in [-1, 1]; above 0 the labeller holds it for true.
    """

    text: str
    score: float
    resampled: tuple[tuple[str, float], ...] = ()


class Candidate(NamedTuple):
    """What might be said about a topic, and the fact that it comes from."""

    text: str
    score: float
    position: Position
    kind: CandidateKind


class Edit(NamedTuple):
    """A fact of the template (its number) and the candidate that takes its place."""

    fact: int
    old: str
    old_score: float
    new: Candidate


class RewriteRequest(NamedTuple):
    """An answer to a question, and the facts to replace in it: (old, new)."""

    question: Question
    answer: str
    edits: tuple[tuple[str, str], ...]


class AnsweringModel(Protocol):
    """What topic overwriting needs of a model: a `VlmAdapter` or a `ChatEndpoint`."""

    @property
    def fingerprint(self) -> str:
        """Identify the model, for cache keys."""
        ...

    def generate(self, questions: Sequence[Question], config: GenerationConfig) -> list[str]:
        """Answer each question."""
        ...

    def yes_no(self, questions: Sequence[Question], batch_size: int) -> list[tuple[float, float]]:
        """Give the probabilities that an answer begins with yes and with no."""
        ...


class Splitter(Protocol):
    """Splits answers into facts."""

    def split(self, answers: Sequence[str]) -> list[list[str]]:
        """List the facts of each answer, in its order; none where nothing can be made of it."""
        ...


class QuestionWriter(Protocol):
    """Writes questions about facts; None where nothing can be asked."""

    def ask(self, facts: Sequence[Sequence[str]]) -> list[list[str | None]]:
        """Write a wh-question about each fact; facts come answer by answer."""
        ...

    def prompt(self, question: str, fact: str) -> str:
        """Put a wh-question to the model whose fact it is about."""
        ...

    def verify(self, statements: Sequence[Sequence[Statement]]) -> list[list[Check | None]]:
        """Write a yes/no question about each statement; they come answer by answer."""
        ...


class ConsistencyJudge(Protocol):
    """Says whether two facts, or two wh-questions, are about one topic."""

    def same_topic(self, pairs: Sequence[tuple[str, str]], aspect: Aspect) -> list[bool]:
        """Judge each pair, whether or not the two agree about the topic."""
        ...


class Labeller(Protocol):
    """Says how likely the answer to a question about a picture is yes, and no."""

    def probabilities(self, questions: Sequence[Question]) -> list[tuple[float, float]]:
        """Return (p_yes, p_no) of each question."""
        ...


class Rewriter(Protocol):
    """Puts other facts into an answer and leaves the rest of it as it is."""

    def rewrite(self, requests: Sequence[RewriteRequest]) -> list[str]:
        """Return each answer with its facts replaced."""
        ...


class CropSimilarity(Protocol):
    """Compares texts with crops of a picture."""

    def maps(self, image: Image.Image, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return the similarity of each text to each crop, (texts, crops)."""
        ...
