"""Which facts of which answer are replaced, on the chosen side and on the rejected side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from mmalign.topics.types import Candidate, Claim, Edit, Position

Select = Literal["extreme", "last_binary"]
Template = Literal["random", "min_edit"]
Answers = Mapping[int, Sequence[Claim]]
"""Claims of the usable answers by number, every one with at least one."""


@dataclass(frozen=True, kw_only=True)
class SelectionRule:
    """How a pair is made of answers.

    Attributes:
        select: right and wrong candidate of a topic: highest and lowest S (`extreme`), or the last
            right and the last wrong one that are met (`last_binary`).
        template: answer that is edited: any (`random`), or the one with the fewest edits on the
            chosen side and, among those, most on the rejected side (`min_edit`).
        min_topics: contested facts that a template has at least.
        hardness: 0 takes the wrong candidate with the lowest S, 1 the one with the highest; only
            under `extreme`.
    """

    select: Select = "extreme"
    template: Template = "random"
    min_topics: int = 3
    hardness: float = 0.0


class Contested(NamedTuple):
    """A fact whose topic has a right and a wrong candidate."""

    fact: int
    right: Candidate
    wrong: Candidate


class Selection(NamedTuple):
    """The edited answer with the edits of both sides, and the answers of best and worst mean S.

    Without an answer that can be edited, `template` is None.
    """

    best: int
    worst: int
    template: int | None = None
    chosen: tuple[Edit, ...] = ()
    rejected: tuple[Edit, ...] = ()


def mean_score(claims: Sequence[Claim]) -> float:
    """Average S over the facts of an answer."""
    return sum(claim.score for claim in claims) / len(claims)


def select_edits(
    answers: Answers, topics: Sequence[Sequence[Position]], rule: SelectionRule, draw: int
) -> Selection | None:
    """Decide what is replaced; None with fewer than two usable answers.

    On the chosen side the contested facts with S <= 0 give way to their topic's right candidate, on
    the rejected side those with S > 0 to the wrong one. A topic's candidates for a fact are the
    facts of the topic and the answers to their questions, without those of other facts of the same
    answer.

    `last_binary` with `min_edit` and 3 topics decides as the authors' `max_all_claim_method` does;
    the paper has `extreme` and `random`.

    Args:
        answers: claims by number of the answer.
        topics: facts grouped by topic, each in the order in which candidates are scanned.
        rule: how to choose.
        draw: number that picks the template under `random`.
    """
    if len(answers) < 2:
        return None
    # Of equal means the later answer ranks higher, as in the authors' reversed ascending sort.
    ranked = sorted(answers, key=lambda k: (mean_score(answers[k]), k), reverse=True)
    best, worst = ranked[0], ranked[-1]
    edits: dict[int, tuple[tuple[Edit, ...], tuple[Edit, ...]]] = {}
    for number in ranked:
        contested = contested_facts(number, answers, topics, rule)
        if len(contested) >= rule.min_topics:
            edits[number] = _sides(answers[number], contested)
    if not edits:
        return Selection(best, worst)
    if rule.template == "random":
        template = sorted(edits)[draw % len(edits)]
    else:
        template = min(edits, key=lambda k: (len(edits[k][0]), -len(edits[k][1])))
    return Selection(best, worst, template, *edits[template])


def contested_facts(
    number: int, answers: Answers, topics: Sequence[Sequence[Position]], rule: SelectionRule
) -> list[Contested]:
    """List the facts of an answer whose topics hold right and wrong candidates."""
    topic_of = {position: topic for topic in topics for position in topic}
    found = []
    for fact in range(len(answers[number])):
        here = (number, fact)
        topic = [p for p in topic_of.get(here, [here]) if p == here or p[0] != number]
        candidates = [c for p in topic if p[0] in answers for c in _candidates(p, answers)]
        right = [candidate for candidate in candidates if candidate.score > 0]
        wrong = [candidate for candidate in candidates if not candidate.score > 0]
        if right and wrong:
            found.append(Contested(fact, *_pick(right, wrong, rule)))
    return found


def _candidates(position: Position, answers: Answers) -> list[Candidate]:
    claim = answers[position[0]][position[1]]
    raw = Candidate(claim.text, claim.score, position, "raw")
    return [raw, *(Candidate(text, s, position, "resampled") for text, s in claim.resampled)]


def _pick(
    right: list[Candidate], wrong: list[Candidate], rule: SelectionRule
) -> tuple[Candidate, Candidate]:
    if rule.select == "last_binary":
        return right[-1], wrong[-1]
    by_score = sorted(wrong, key=lambda candidate: candidate.score)
    hard = by_score[round(rule.hardness * (len(by_score) - 1))]
    return max(right, key=lambda candidate: candidate.score), hard


def _sides(
    claims: Sequence[Claim], contested: Sequence[Contested]
) -> tuple[tuple[Edit, ...], tuple[Edit, ...]]:
    chosen, rejected = [], []
    for fact, right, wrong in contested:
        claim = claims[fact]
        if claim.score > 0:
            rejected.append(Edit(fact, claim.text, claim.score, wrong))
        else:
            chosen.append(Edit(fact, claim.text, claim.score, right))
    return tuple(chosen), tuple(rejected)
