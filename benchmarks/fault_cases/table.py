"""The page that shows the outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .harness import ROWS, Outcome

HEAD = "| case | expected | tried | survived | how it answered |"
START, END = "<!-- outcomes -->", "<!-- end of outcomes -->"


def write_page(outcomes: Sequence[Outcome], page: Path) -> None:
    """Put the table between the two marks of the page, or make a page of it alone."""
    text = page.read_text() if page.exists() else f"# Reliability\n\n{START}\n{END}\n"
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{START}\n{table(outcomes)}\n{END}{after}")


def table(outcomes: Sequence[Outcome]) -> str:
    """Make one table of all rows, and their sums before it."""
    tried, survived = (sum(getattr(o, n) for o in outcomes) for n in ("tried", "survived"))
    lines = [f"{len(outcomes)} cases, {tried} faults injected, {survived} answered as expected."]
    for row, title in ROWS.items():
        mine = [outcome for outcome in outcomes if outcome.row == row]
        if not mine:
            continue
        lines += ["", f"### {row}. {title}", ""]
        lines += [
            "| case | expected | tried | survived | how it answered |",
            "|---|---|--:|--:|---|",
        ]
        lines += [
            f"| {_cell(o.name)} | {_cell(o.expects)} | {o.tried} | {o.survived} |"
            f" {_cell(o.answer)} |"
            for o in mine
        ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    plain = "".join(c if c.isprintable() else "?" for c in text)
    return plain.replace("|", "\\|").replace("<", "&lt;")
