"""What a benchmark found: the numbers, their intervals, and every answer as the page shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Kind = Literal["bad", "good"]


class Span(NamedTuple):
    """A part of an answer: `answer[start:stop]` names something absent (bad) or present (good)."""

    start: int
    stop: int
    kind: Kind


@dataclass(frozen=True, kw_only=True)
class Case:
    """One answer and what is wrong with it.

    Attributes:
        item: id of the image or question.
        question: what was asked; empty when the file does not say.
        answer: what the model said.
        truth: what is right, in words.
        verdict: what is wrong or right, in words.
        badness: 0 for a right answer; worst cases have the most.
        counts: what the answer adds to the benchmark's totals.
        cluster: answers of one cluster are resampled together: the image, where it is known.
        spans: marked parts of the answer, in order.
        image: file name of the image, where it is known.
    """

    item: str
    question: str
    answer: str
    truth: str
    verdict: str
    badness: float
    counts: Mapping[str, float]
    cluster: str
    spans: Sequence[Span] = ()
    image: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Everything measured.

    Attributes:
        benchmark: its name, and the variant that was run.
        metrics: official names in lower case, and beside them `length`, `yes_rate`, `no_rate` and
            `coverage`, NaN where a benchmark has no such thing.
        ci95: metric -> 95 % interval.
        cases: every answer.
        headline: the metrics to show first, with what they are called.
        warnings: what the numbers do not say.
    """

    benchmark: str
    metrics: Mapping[str, float]
    ci95: Mapping[str, tuple[float, float]]
    cases: Sequence[Case]
    headline: Mapping[str, str]
    warnings: Sequence[str] = field(default_factory=list)


def worst_first(cases: Sequence[Case], most: int) -> list[Case]:
    """Take the wrong answers, worst first, at most `most`; equally bad ones keep their order."""
    wrong = [case for case in cases if case.badness > 0]
    return sorted(wrong, key=lambda case: -case.badness)[:most]
