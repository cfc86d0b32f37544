"""What the scores of a comparison amount to: means, changes, pairwise win rates, extreme cases."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from mmalign.data.votes import Agreement
from mmalign.intervals import Mean, WinRate, mean_ci, win_rate
from mmalign.pipelines._subject_images import Row
from mmalign.pipelines._subject_scores import Scores
from mmalign.significance import holm, sign_flip_p

PEOPLE = "people"
ALPHA = 0.05
DIVERSITY = "diversity"


class Duel(NamedTuple):
    """Two subjects by their numbers, and how often `one` beats `other`.

    `p` is of the exact test that flips whole prompts; `p_holm` is corrected for all duels of the
    same judge.
    """

    one: int
    other: int
    rate: WinRate
    p: float
    p_holm: float

    @property
    def significant(self) -> bool:
        """Tell whether the difference holds at level `ALPHA` after the correction."""
        return self.p_holm < ALPHA


class Metric(NamedTuple):
    """A metric's mean for every subject, and its paired change against the baseline."""

    name: str
    means: list[Mean]
    changes: list[Mean | None]


class Case(NamedTuple):
    """A row in which a subject gained (or lost, below 0) much against the baseline."""

    row: int
    gain: float


class People(NamedTuple):
    """What people answered.

    Attributes:
        names: how many people.
        answers: how many answers of theirs.
        asked: pairs that they were shown.
        judged: pairs that somebody judged.
        same: pairs of equal pictures, which nobody was asked about.
        agreement: on the pairs that several people judged.
        share_ci95: of the share of pairs on which all said the same.
        kappa_ci95: of Fleiss' kappa.
    """

    names: int
    answers: int
    asked: int
    judged: int
    same: int
    agreement: Agreement
    share_ci95: tuple[float, float] | None
    kappa_ci95: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything found; subjects are numbered, the baseline is 0.

    Attributes:
        metrics: rewards, the judge, what the judge adds, diversity.
        duels: judge -> every two subjects; first the one that counts most.
        cases: number of a subject -> its rows by gain, largest first, without those of no gain.
        cases_by: metric of these gains; None where nothing scores.
        judge: name of the metric that is `evaluation.judge`.
        people: None where nobody has answered.
    """

    metrics: list[Metric]
    duels: dict[str, list[Duel]]
    cases: dict[int, list[Case]]
    cases_by: str | None
    judge: str | None
    people: People | None


Differences = Callable[[int, int], tuple[list[float], list[str]]]
"""What subject `one` has over `other` in each comparison, and the prompt of each."""


def analyse(
    rows: Sequence[Row],
    scores: Sequence[Scores],
    *,
    rewards: Sequence[str],
    judge: str | None,
    answers: tuple[Differences, People] | None,
    seed: int,
) -> Results:
    """Compare subjects on everything that was measured.

    Args:
        rows: what every subject has an image of.
        scores: of each subject, the baseline first.
        rewards: metrics that are rewards.
        judge: metric that is the judge.
        answers: who people preferred.
        seed: of the bootstrap.
    """
    prompts = [row.prompt for row in rows]
    count = len(scores)
    duels: dict[str, list[Duel]] = {}
    if answers is not None:
        duels[PEOPLE] = all_duels(count, answers[0], seed)
    by = [name for name in (judge, *rewards) if name is not None]
    for name in by:
        columns = [own.columns[name] for own in scores]
        duels[name] = all_duels(count, _paired(columns, prompts), seed)
    return Results(
        metrics=_metrics(scores, prompts, seed),
        duels=duels,
        cases=_cases(scores, by[0], rows) if by else {},
        cases_by=by[0] if by else None,
        judge=judge,
        people=None if answers is None else answers[1],
    )


def all_duels(subjects: int, differences: Differences, seed: int) -> list[Duel]:
    """Compare every two subjects, with p-values corrected for their number (Holm).

    Two subjects without a comparison have no duel.
    """
    found = []
    for one, other in combinations(range(subjects), 2):
        gains, prompts = differences(other, one)
        if gains:
            rate = win_rate(gains, [0.0] * len(gains), prompts, seed=seed)
            found.append(Duel(other, one, rate, sign_flip_p(_per_prompt(gains, prompts)), 1.0))
    corrected = holm([duel.p for duel in found])
    return [duel._replace(p_holm=p) for duel, p in zip(found, corrected, strict=True)]


def duel_of(duels: Sequence[Duel], one: int, other: int) -> Duel | None:
    """Find a duel, seen from `one`."""
    for duel in duels:
        if (duel.one, duel.other) == (one, other):
            return duel
        if (duel.one, duel.other) == (other, one):
            return _turned(duel)
    return None


def _turned(duel: Duel) -> Duel:
    rate = duel.rate
    low, high = rate.ci95
    turned = WinRate(
        value=1 - rate.value,
        ci95=(1 - high, 1 - low),
        n=rate.n,
        wins=rate.losses,
        losses=rate.wins,
        ties=rate.ties,
        value_with_ties=1 - rate.value_with_ties,
    )
    return Duel(duel.other, duel.one, turned, duel.p, duel.p_holm)


def _paired(columns: Sequence[Sequence[float]], prompts: list[str]) -> Differences:
    def differences(one: int, other: int) -> tuple[list[float], list[str]]:
        pairs = zip(columns[one], columns[other], strict=True)
        return [a - b for a, b in pairs], prompts

    return differences


def _per_prompt(gains: Sequence[float], prompts: Sequence[str]) -> list[int]:
    sums = dict.fromkeys(prompts, 0)
    for gain, prompt in zip(gains, prompts, strict=True):
        sums[prompt] += (gain > 0) - (gain < 0)
    return list(sums.values())


def _metrics(scores: Sequence[Scores], prompts: list[str], seed: int) -> list[Metric]:
    found = []
    for name in scores[0].columns:
        columns = [own.columns[name] for own in scores]
        found.append(_metric(name, columns, prompts, seed))
    if scores[0].diversity:
        several = list(scores[0].diversity)
        spreads = [[own.diversity[prompt] for prompt in several] for own in scores]
        found.append(_metric(DIVERSITY, spreads, several, seed))
    return found


def _metric(name: str, columns: list[list[float]], groups: list[str], seed: int) -> Metric:
    changes: list[Mean | None] = [None]
    for column in columns[1:]:
        change = [a - b for a, b in zip(column, columns[0], strict=True)]
        changes.append(mean_ci(change, groups, seed=seed))
    return Metric(name, [mean_ci(column, groups, seed=seed) for column in columns], changes)


def _cases(scores: Sequence[Scores], by: str, rows: Sequence[Row]) -> dict[int, list[Case]]:
    base = scores[0].columns[by]
    found = {}
    for number, own in enumerate(scores[1:], start=1):
        gains = [a - b for a, b in zip(own.columns[by], base, strict=True)]
        cases = [Case(row, gain) for row, gain in enumerate(gains) if gain]
        found[number] = sorted(cases, key=lambda case: -case.gain)
    return found


def results_json(results: Results, names: Sequence[str]) -> Mapping[str, object]:
    """Lay everything out for `results.json`; numbers that are not finite become null."""
    duels = [
        {
            "judge": judge,
            "subject": names[duel.one],
            "against": names[duel.other],
            **duel.rate._asdict(),
            "p": duel.p,
            "p_holm": duel.p_holm,
        }
        for judge, found in results.duels.items()
        for duel in found
    ]
    people = results.people
    return _finite(
        {
            "subjects": list(names),
            "baseline": names[0],
            "judge": results.judge,
            "metrics": {
                metric.name: {
                    name: {**mean._asdict(), "change": change and change._asdict()}
                    for name, mean, change in zip(names, metric.means, metric.changes, strict=True)
                }
                for metric in results.metrics
            },
            "win_rates": duels,
            "people": people and {**people._asdict(), "agreement": people.agreement._asdict()},
        }
    )


def _finite(value: object) -> Mapping[str, object]:
    def clean(item: object) -> object:
        if isinstance(item, dict):
            return {key: clean(inner) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            return [clean(inner) for inner in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    cleaned = clean(value)
    assert isinstance(cleaned, dict)
    return cleaned
