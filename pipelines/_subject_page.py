"""A comparison for people: `report.html`, and the lines in the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mmalign.data.files import write_bytes
from mmalign.pipelines._pictures import embed
from mmalign.pipelines._subject_images import Row
from mmalign.pipelines._subject_scores import Scores
from mmalign.pipelines._subject_stats import ALPHA, PEOPLE, Duel, Results, duel_of
from mmalign.report import RunSummary, render

if TYPE_CHECKING:
    from mmalign.pipelines._subjects import Subject

DASH = "\u2013"
GRID_PICTURES = 36
CASES = 4
CASE_PAIRS = 24
"""Cases over all subjects, so that a page of many subjects stays one that can be sent."""


class Shown(NamedTuple):
    """One picture with what was measured on it."""

    title: str
    uri: str
    tiny: bool
    verdict: str
    good: bool | None
    scores: list[tuple[str, float]]


class CaseShown(NamedTuple):
    """Baseline and subject side by side; `seed` says what they were sampled from."""

    prompt: str
    seed: str
    gain: float
    sides: list[Shown]


class Cell(NamedTuple):
    """A win rate as text; `tone` is `good` or `bad` where it holds after the correction."""

    text: str
    interval: str
    detail: str
    tone: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that the page shows.

    Attributes:
        subjects: the baseline first.
        rows: what every subject has an image of.
        files: of each subject, one per row.
        scores: of each subject.
        results: what they amount to.
        summary: numbers of the run.
        notes: what people should know before they read on.
        config: resolved configuration as YAML.
    """

    subjects: Sequence[Subject]
    rows: Sequence[Row]
    files: Sequence[Sequence[Path]]
    scores: Sequence[Scores]
    results: Results
    summary: RunSummary
    notes: Sequence[str]
    config: str

    @property
    def names(self) -> list[str]:
        """The names of the subjects."""
        return [subject.name for subject in self.subjects]


def write_page(folder: Path, comparison: Comparison) -> None:
    """Write `report.html`: one file that needs neither network nor scripts.

    Raises:
        InputError: if the folder cannot be written.
    """
    results, count = comparison.results, len(comparison.subjects)
    first = next(iter(results.duels), None)
    duels = results.duels[first] if first is not None else []
    text = render(
        "subjects.html.j2",
        page=comparison,
        names=comparison.names,
        summary=comparison.summary,
        results=results,
        prompts=len({row.prompt for row in comparison.rows}),
        judged_by=first,
        against=[(n, duel_of(duels, n, 0)) for n in range(1, count)],
        matrices=[(judge, _matrix(found, count)) for judge, found in results.duels.items()],
        cell=_cell,
        caution=caution(results, count),
        agreement=agreement_line(results),
        cases=_cases(comparison),
        grid=_grid(comparison),
        ALPHA=ALPHA,
    )
    write_bytes(folder / "report.html", text.encode())


def caution(results: Results, subjects: int) -> str:
    """Say what looking at several comparisons does; empty where nothing was compared."""
    pairs, judges = subjects * (subjects - 1) // 2, len(results.duels)
    if not judges:
        return ""
    if pairs > 1:
        text = (
            f"Each judge compares {pairs} pairs of subjects. Of so many, some would differ by"
            f" chance alone, so p-values are corrected for the {pairs} pairs of one judge (Holm);"
            " intervals are not."
        )
    else:
        text = "With two subjects each judge makes one comparison, so nothing is corrected."
    if judges > 1:
        text += (
            f" The {judges} judges are not corrected for each other: decide beforehand which one"
            " counts, and take the others as a description."
        )
    return text


def agreement_line(results: Results) -> str:
    """Say how many people answered and how far they agree; empty where nobody did."""
    people = results.people
    if people is None:
        return ""
    who = "1 person" if people.names == 1 else f"{people.names} people"
    text = f"{who} gave {people.answers} answers on {people.judged} of {people.asked} pairs."
    agreement = people.agreement
    if agreement.share is None or people.share_ci95 is None:
        text += " No pair was judged by two people, so nothing is known of how far they agree."
    else:
        low, high = people.share_ci95
        text += (
            f" All said the same on {agreement.share:.0%} of the {agreement.pairs} pairs judged by"
            f" several (95 % interval {low:.0%} to {high:.0%})"
        )
        if agreement.kappa is not None and people.kappa_ci95 is not None:
            low, high = people.kappa_ci95
            text += f"; Fleiss' kappa {agreement.kappa:.2f} ({low:.2f} to {high:.2f})"
        text += "."
    if people.same:
        text += f" {people.same} more pairs are the same picture twice; nobody was asked."
    return text


def results_text(comparison: Comparison) -> str:
    """Lay out means and win rates as lines for the terminal."""
    names, results = comparison.names, comparison.results
    widths = [max(len(name), 9) for name in names]
    first = max(len(metric.name) for metric in results.metrics) if results.metrics else 0
    first = max(first, len("metric"))
    heads = "  ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    lines = [f"{'metric':<{first}}  {heads}"] if results.metrics else []
    for metric in results.metrics:
        cells = zip(metric.means, widths, strict=True)
        values = "  ".join(f"{mean.value:>{width}.4g}" for mean, width in cells)
        lines.append(f"{metric.name:<{first}}  {values}")
        for name, change in zip(names, metric.changes, strict=True):
            if change is not None:
                low, high = change.ci95
                lines.append(f"  {name}: {change.value:+.4g} [{low:+.3g}, {high:+.3g}]")
    for judge, duels in results.duels.items():
        lines += [_duel_line(duel, judge, names) for duel in duels]
    lines += [line for line in (agreement_line(results), caution(results, len(names))) if line]
    return "\n".join(lines)


def _duel_line(duel: Duel, judge: str, names: Sequence[str]) -> str:
    rate, pair = duel.rate, f"{names[duel.one]} over {names[duel.other]}"
    if not rate.wins + rate.losses:
        return f"{pair}: win rate undecided: {judge} called all {rate.n} pairs a tie"
    return (
        f"{pair}: win rate {rate.value:.2f} [{rate.ci95[0]:.2f}, {rate.ci95[1]:.2f}] by {judge}: "
        f"{rate.wins} wins, {rate.losses} losses, {rate.ties} ties, {_p(duel.p_holm)}"
    )


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def _matrix(duels: Sequence[Duel], count: int) -> list[list[Cell | None]]:
    return [
        [None if one == other else _cell(duel_of(duels, one, other)) for other in range(count)]
        for one in range(count)
    ]


def _cell(duel: Duel | None) -> Cell:
    if duel is None:
        return Cell(DASH, "", "not compared", "")
    rate = duel.rate
    counts = f"{rate.wins} wins, {rate.losses} losses, {rate.ties} ties"
    if not math.isfinite(rate.value):
        return Cell(DASH, "all ties", counts, "")
    tone = "" if not duel.significant else "good" if rate.value > 0.5 else "bad"
    low, high = (round(100 * value) for value in rate.ci95)
    return Cell(f"{rate.value:.0%}", f"{low} to {high} %", f"{counts}, {_p(duel.p_holm)}", tone)


def _cases(comparison: Comparison) -> list[tuple[str, list[tuple[str, list[CaseShown]]]]]:
    """Choose the largest gains and losses of every subject, no prompt twice in a list."""
    found = []
    results = comparison.results
    size = max(1, min(CASES, CASE_PAIRS // max(1, 2 * len(results.cases))))
    for number, cases in results.cases.items():
        gains = [case for case in cases if case.gain > 0]
        losses = [case for case in reversed(cases) if case.gain < 0]
        lists = []
        for title, some in (("largest gains", gains), ("largest losses", losses)):
            prompts: set[str] = set()
            shown: list[CaseShown] = []
            for case in some:
                row = comparison.rows[case.row]
                if row.prompt not in prompts and len(shown) < size:
                    prompts.add(row.prompt)
                    pair = (0, number)
                    sides = [_shown(comparison, side, case.row) for side in pair]
                    seed = _seed(comparison, row, pair)
                    shown.append(CaseShown(row.prompt, seed, case.gain, sides))
            lists.append((title, shown))
        found.append((comparison.names[number], lists))
    return found


def _grid(comparison: Comparison) -> list[tuple[str, str, list[Shown]]]:
    """Show the first image of prompts evenly spaced: nothing is picked by its looks."""
    first = [number for number, row in enumerate(comparison.rows) if row.number == 0]
    wanted = max(3, GRID_PICTURES // len(comparison.subjects))
    if len(first) > wanted:
        first = [first[index * len(first) // wanted] for index in range(wanted)]
    sides = range(len(comparison.subjects))
    return [
        (
            comparison.rows[number].prompt,
            _seed(comparison, comparison.rows[number], sides),
            [_shown(comparison, side, number) for side in sides],
        )
        for number in first
    ]


def _seed(comparison: Comparison, row: Row, sides: Sequence[int]) -> str:
    """Say which seed was sampled from; pictures of folders have none."""
    made = [side for side in sides if comparison.subjects[side].model is not None]
    if not made:
        return ""
    names = ", ".join(comparison.names[side] for side in made)
    return f"seed {row.seed}" if len(made) == len(sides) else f"seed {row.seed} of {names}"


def _shown(comparison: Comparison, side: int, row: int) -> Shown:
    scores, file = comparison.scores[side], comparison.files[side][row]
    by = [name for name in comparison.results.duels if name != PEOPLE]
    picture = embed(file)
    return Shown(
        title=comparison.names[side],
        uri=picture.uri,
        tiny=picture.tiny,
        verdict=scores.verdicts[row] if scores.verdicts else "",
        good=scores.correct[row] if scores.correct else None,
        scores=[(name, scores.columns[name][row]) for name in by],
    )
