"""Results of a comparison for people: `results.md`, `report.html`, and `results.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mmalign.config import CompareConfig, as_path, dump_config
from mmalign.data.files import write_bytes
from mmalign.pipelines._compare_stats import MethodResult, results_json
from mmalign.plots import Panel, Series, chart
from mmalign.report import library_versions, render

DASH, MINUS = "\u2013", "\u2212"


class Column(NamedTuple):
    """One column: its head, the metric in it, and how a number is written."""

    head: str
    key: Callable[[MethodResult], str]
    form: Callable[[float], str]


class Cell(NamedTuple):
    """A mean and its interval as text; the interval is empty with one seed."""

    text: str
    interval: str


def signed(value: float) -> str:
    """Write a change."""
    text = f"{value:+.3f}"
    return "0.000" if float(text) == 0 else text.replace("-", MINUS)


def percent(value: float) -> str:
    """Write a share; a t-interval may leave the range of shares, its text does not."""
    return f"{100 * min(1.0, max(0.0, value)):.0f} %"


def tenths(value: float) -> str:
    """Write a small share."""
    return f"{100 * min(1.0, max(0.0, value)):.1f} %"


def points(value: float) -> str:
    """Write a change of a share in percentage points."""
    return signed_tenths(100 * value)


def signed_tenths(value: float) -> str:
    """Write a change."""
    text = f"{value:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", MINUS)


def count(value: float) -> str:
    """Write a large number."""
    return f"{value:,.0f}"


def short(value: float) -> str:
    """Write a number with three digits."""
    return f"{value:.3g}".replace("-", MINUS)


WIN_RATE = Column("win rate", lambda r: "win_rate", percent)
QUALITY = (
    WIN_RATE,
    Column("judge", lambda r: f"change/{r.judge}", signed),
    Column("reward", lambda r: f"change/{r.reward}", signed),
    Column("correct", lambda r: "after/correct", percent),
    Column("valid", lambda r: "after/valid", percent),
    Column("diversity", lambda r: "change/diversity", signed),
    Column("KL", lambda r: "after/kl", short),
    Column("CHAIR_s", lambda r: "after/chair_s", tenths),
    Column("CHAIR_i", lambda r: "after/chair_i", tenths),
    Column("coverage", lambda r: "change/coverage", points),
    Column("words", lambda r: "change/length", signed_tenths),
    Column("yes/no right", lambda r: "change/yes_no_accuracy", points),
    Column("yes rate", lambda r: "change/yes_rate", points),
)
COST = (
    Column("steps", lambda r: "steps", count),
    Column("queries", lambda r: "cost/reward_queries", count),
    Column("forwards", lambda r: "cost/unet_forwards", count),
    Column("backwards", lambda r: "cost/unet_backwards", count),
    Column("tokens", lambda r: "cost/tokens_forward", count),
    Column("seconds", lambda r: "cost/train_seconds", count),
    Column("peak MiB", lambda r: "peak_memory_mib", count),
)


class Table(NamedTuple):
    """Heads, and a row of cells per method."""

    heads: list[str]
    rows: list[tuple[str, list[Cell]]]


def write_results(config: CompareConfig, results: Sequence[MethodResult]) -> str:
    """Write the three files; returns the table and where the page is, for the terminal.

    Raises:
        InputError: the folder cannot be written.
    """
    folder = as_path(config.output_dir)
    table = markdown(config, results)
    content = {
        "seeds": config.seeds,
        "budget": {"unit": config.budget.unit, "amount": config.budget.amount},
        "versions": library_versions(),
        "methods": results_json(results),
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes(folder / "results.json", text.encode())
    write_bytes(folder / "results.md", table.encode())
    write_bytes(folder / "report.html", page(config, results).encode())
    return f"{table}\nreport: {folder / 'report.html'}"


def cell(result: MethodResult, column: Column) -> Cell:
    """Write one number with its interval; costs, nearly the same for all seeds, go without."""
    value = result.metric(column.key(result))
    if not value.n:
        return Cell(DASH, "")
    if value.n < 2 or column in COST:
        return Cell(column.form(value.mean), "")
    return Cell(column.form(value.mean), f"[{column.form(value.low)}, {column.form(value.high)}]")


def quality_table(results: Sequence[MethodResult]) -> Table:
    """Lay out what came of it; columns that no method has are left out."""
    columns = _shown(results, QUALITY)
    table = _table(results, columns)
    if WIN_RATE in columns:
        table.heads.insert(1, "pooled")
        for result, (_, cells) in zip(results, table.rows, strict=True):
            cells.insert(1, _pooled(result))
    return table


def cost_table(results: Sequence[MethodResult]) -> Table:
    """Lay out what it took."""
    table = _table(results, _shown(results, COST))
    table.heads.insert(0, "seeds")
    for result, (_, cells) in zip(results, table.rows, strict=True):
        cells.insert(0, Cell(_seeds(result), ""))
    return table


def markdown(config: CompareConfig, results: Sequence[MethodResult]) -> str:
    """Lay the results out as one Markdown table with its explanation."""
    quality, cost = quality_table(results), cost_table(results)
    heads = ["method", *quality.heads, *cost.heads]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for (name, left), (_, right) in zip(quality.rows, cost.rows, strict=True):
        texts = [" ".join(cell).strip() for cell in (*left, *right)]
        lines.append("| " + " | ".join([name, *texts]) + " |")
    return "\n".join([*lines, "", "\n\n".join(explanation(config, results))]) + "\n"


def explanation(config: CompareConfig, results: Sequence[MethodResult]) -> list[str]:
    """Say what the numbers are, as sentences."""
    judge = next((r.judge for r in results if r.judge), None)
    included = "" if config.budget.unit == "steps" else ", pairs included"
    several = config.seeds > 1
    seeds = f"{config.seeds} seeds" if several else "One seed"
    between = "means with the 95 % t-interval over seeds in brackets" if several else "no interval"
    return [
        f"Budget: {config.budget.amount:g} {config.budget.unit} per run{included}. "
        f"{seeds}: {between}.",
        f"The win rate is that of the trained model over its own base by {judge}, which no training"
        " saw, on the same prompts and seeds for all methods, ties left out; pooled, over all"
        " seeds' comparisons together."
        if judge
        else "No judge was given, so there is no win rate.",
        *([_OF_ANSWERS] if any(r.train == "vlm-dpo" for r in results) else []),
        *([_of_images(results)] if any(r.train != "vlm-dpo" for r in results) else []),
    ]


_OF_ANSWERS = (
    "CHAIR_s is the trained model's share of answers that name an object that is not there, CHAIR_i"
    " that of mentioned objects. Judge is the change from the base to the trained model, and so are"
    " coverage (share of the objects that are named), yes/no right and yes rate, in percentage"
    " points, and words per answer. Tokens are those through the language model while training,"
    " reference included."
)


def _of_images(results: Sequence[MethodResult]) -> str:
    rewards = ", ".join(dict.fromkeys(r.reward for r in results if r.reward))
    return (
        f"Judge, reward ({rewards}) and diversity are changes from the base to the trained model;"
        " correct and valid are the trained model's. KL is in nats per latent element, from the"
        " base, summed over sampler steps. Forwards and backwards are rows through the denoiser,"
        " queries are images scored, both while training and for pairs; seconds likewise."
    )


def page(config: CompareConfig, results: Sequence[MethodResult]) -> str:
    """Make the page: one file that needs neither network nor scripts."""
    return render(
        "compare.html.j2",
        config=config,
        results=results,
        tables=[("What came of it", quality_table(results)), ("What it took", cost_table(results))],
        forest=[_forest_row(r) for r in results if r.metric("win_rate").n],
        curves=[(r, _curves(r, results)) for r in results if len(r.curve) > 1],
        sentences=explanation(config, results),
        versions=library_versions(),
        settings=dump_config(config),
    )


def _forest_row(result: MethodResult) -> dict[str, Any]:
    """Place mean and interval on a line from 0 to 1."""
    value = result.metric("win_rate")
    low, high = (min(1.0, max(0.0, v)) if math.isfinite(v) else value.mean for v in value[1:3])
    return {
        "name": result.name,
        "point": 100 * value.mean,
        "left": 100 * low,
        "width": 100 * (high - low),
        "cell": cell(result, WIN_RATE),
    }


def _curves(result: MethodResult, results: Sequence[MethodResult]) -> list[Panel]:
    """Draw a method's judge against its reward, and both over forwards, before all others."""
    judge, reward = result.judge, result.reward
    forwards = "unet_forwards"
    wanted = [
        (f"{judge} against {reward}", reward, judge, str(reward)),
        (f"{judge} over forwards", forwards, judge, "rows through the denoiser"),
        (f"{reward} over forwards", forwards, reward, "rows through the denoiser"),
    ]
    panels = []
    for title, across, up, x_title in wanted:
        if across is None or up is None:
            continue
        line = _line(result, across, up)
        others = [_line(r, across, up) for r in results if r is not result]
        behind = [other for other in others if other.points]
        if line.points:
            drawing = chart([line], title, behind=behind, x_title=x_title)
            panels.append(Panel(title, [line], drawing))
    return panels


def _line(result: MethodResult, across: str, up: str) -> Series:
    rows = [row for row in result.curve if across in row and up in row]
    return Series(result.name, [(row[across], row[up]) for row in rows])


def _shown(results: Sequence[MethodResult], columns: Sequence[Column]) -> list[Column]:
    return [c for c in columns if any(r.metric(c.key(r)).n for r in results)]


def _table(results: Sequence[MethodResult], columns: Sequence[Column]) -> Table:
    rows = [(result.name, [cell(result, column) for column in columns]) for result in results]
    return Table([column.head for column in columns], rows)


def _pooled(result: MethodResult) -> Cell:
    rate = result.pooled
    if not math.isfinite(rate.value):
        return Cell(DASH, "")
    return Cell(percent(rate.value), f"{rate.wins}:{rate.losses}")


def _seeds(result: MethodResult) -> str:
    done, failed = len(result.seeds), len(result.failed)
    return f"{done} ({failed} failed)" if failed else str(done)
