"""The page that shows the outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .harness import ROWS, Case, Outcome

HEAD = "| case | expected | tried | survived | how it answered |"
START, END = "<!-- outcomes -->", "<!-- end of outcomes -->"


def write_page(outcomes: Sequence[Outcome], cases: Sequence[Case], page: Path) -> None:
    """Put the table between the two marks of the page, or make a page of it alone."""
    text = page.read_text() if page.exists() else f"# Reliability\n\n{START}\n{END}\n"
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{START}\n{table(outcomes, cases)}\n{END}{after}")


def table(outcomes: Sequence[Outcome], cases: Sequence[Case]) -> str:
    """Make a table per row, and their sums before it; cases without an outcome are named."""
    tried, survived = (sum(getattr(o, n) for o in outcomes) for n in ("tried", "survived"))
    lines = [
        f"{len(outcomes)} of {len(cases)} cases run, {tried} faults injected, {survived} answered"
        " as expected."
    ]
    for row, title in ROWS.items():
        mine = [outcome for outcome in outcomes if outcome.row == row]
        known = {outcome.name for outcome in mine}
        missing = [case.name for case in cases if case.row == row and case.name not in known]
        lines += ["", f"### {row}. {title}", ""]
        if mine:
            lines += [HEAD, "|---|---|--:|--:|---|", *map(_line, mine)]
        if missing:
            lines += [*([""] if mine else []), f"Not run yet: {'; '.join(missing)}."]
    return "\n".join(lines)


def _line(outcome: Outcome) -> str:
    name, expects, answer = map(_cell, (outcome.name, outcome.expects, outcome.answer))
    return f"| {name} | {expects} | {outcome.tried} | {outcome.survived} | {answer} |"


def _cell(text: str) -> str:
    plain = "".join(c if c.isprintable() else "?" for c in text)
    return plain.replace("|", "\\|").replace("<", "&lt;")
