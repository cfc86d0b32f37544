"""One page of several runs: what each made before and after, what it won, what it cost."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from tqdm.auto import tqdm

from mmalign.config import as_path
from mmalign.data.files import read_jsonl, read_text, resolve_inside, write_bytes
from mmalign.data.folders import METADATA
from mmalign.data.schema import RowError
from mmalign.pipelines._pictures import Embedded, embed
from mmalign.report import render
from mmalign.types import InputError

if TYPE_CHECKING:
    from mmalign.config import GalleryConfig

SUMMARY = "summary.json"
SUFFIX = "_file_name"
MAX_SIDES = 4
Pieces = Sequence[tuple[str, bool]]
COSTS = {
    "unet_forwards": "denoiser rows forward",
    "unet_backwards": "denoiser rows backward",
    "reward_queries": "images scored",
    "train_seconds": "seconds of training",
}


class Side(NamedTuple):
    """What one model made of a prompt: a picture, or an answer in pieces, some marked as wrong."""

    label: str
    picture: Embedded | None
    text: Pieces


class Example(NamedTuple):
    """One prompt, the picture it is about where it is about one, and all sides."""

    prompt: str
    about: Embedded | None
    sides: list[Side]


class Rate(NamedTuple):
    """A win rate in [0, 1] with its interval."""

    value: float
    low: float
    high: float
    detail: str


class Metric(NamedTuple):
    """A metric before and after; None where a run has only one of them."""

    name: str
    before: float | None
    after: float | None


class Run(NamedTuple):
    """One run as the page shows it; `link` is an address relative to the page."""

    title: str
    folder: str
    facts: list[tuple[str, str]]
    rate: Rate | None
    metrics: list[Metric]
    costs: list[tuple[str, float]]
    examples: list[Example]
    link: str | None


def run(config: GalleryConfig) -> None:
    """Write the page.

    Raises:
        InputError: if there is no run, a folder is not one, its files are damaged, or the page
            cannot be written.
    """
    if not config.runs:
        raise InputError("runs: give the folders of at least one run")
    output = as_path(config.output)
    runs = [
        read_run(as_path(name), output, config.examples)
        for name in tqdm(config.runs, desc="read runs", unit="run", delay=1.0)
    ]
    marked = any(
        wrong
        for found in runs
        for example in found.examples
        for side in example.sides
        for _, wrong in side.text
    )
    page = render("gallery.html.j2", title=config.title, runs=runs, costs=COSTS, marked=marked)
    write_bytes(output, page.encode())
    tqdm.write(f"{len(runs)} runs, {len(page.encode()) / 2**10:,.0f} KiB: {output}")


def read_run(folder: Path, output: Path, examples: int) -> Run:
    """Read the folder of a run: `summary.json`, and `samples/` where it has any.

    Args:
        folder: the run.
        output: the page, which the run's report is linked from if it lies beside or below it.
        examples: prompts to show, evenly spaced.

    Raises:
        InputError: naming the file, if it is not the folder of a run or is damaged.
    """
    file = folder / SUMMARY
    if not file.is_file():
        raise InputError(f"{folder} is not the folder of a run: it has no {SUMMARY}")
    try:
        summary = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON: {error}") from error
    if not isinstance(summary, dict) or not isinstance(summary.get("method"), str):
        raise InputError(f"{file} is not the summary of a run: it has no method")
    seconds, memory = _number(summary.get("wall_seconds")), _number(summary.get("peak_memory_mib"))
    facts = [(name, str(summary[name])) for name in ("seed", "steps", "device") if name in summary]
    if seconds is not None:
        facts.append(("time", f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"))
    if memory is not None:
        facts.append(("peak memory", f"{memory:,.0f} MiB"))
    return Run(
        title=summary["method"],
        folder=folder.resolve().name,
        facts=[("model", str(summary.get("model", ""))), *facts],
        rate=_rate(summary.get("win_rate")),
        metrics=_metrics(_mapping(summary.get("before")), _mapping(summary.get("after"))),
        costs=[(n, v) for n in COSTS if (v := _number(_mapping(summary.get("cost")).get(n)))],
        examples=_examples(folder / "samples", examples),
        link=_link(folder / "report.html", output),
    )


def _rate(found: object) -> Rate | None:
    rate = _mapping(found)
    value, interval = _number(rate.get("value")), rate.get("ci95")
    if value is None or not isinstance(interval, list) or len(interval) != 2:
        return None
    low, high = (_number(bound) for bound in interval)
    if low is None or high is None:
        return None
    counts = [f"{rate[name]} {name}" for name in ("wins", "losses", "ties") if name in rate]
    detail = f"judge {rate.get('judge', 'unknown')}: {', '.join(counts)}"
    value, low, high = (min(1.0, max(0.0, number)) for number in (value, low, high))
    return Rate(value, low, high, detail)


def _metrics(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Metric]:
    names = dict.fromkeys([*before, *after])
    return [Metric(str(n), _number(before.get(n)), _number(after.get(n))) for n in names]


def _examples(samples: Path, count: int) -> list[Example]:
    """Show the first row of prompts evenly spaced: nothing is picked by its looks.

    Rows have pictures as `<side>_file_name`, or one `file_name` and texts `before` and `after`.
    """
    table = samples / METADATA
    if not table.is_file() or count < 1:
        return []
    rows: dict[str, tuple[int, dict[str, Any]]] = {}
    for number, record in read_jsonl(table):
        if isinstance(record, RowError) or not isinstance(record.get("prompt"), str):
            problem = record if isinstance(record, RowError) else "it has no prompt"
            raise InputError(f"{table} line {number}: {problem}")
        key = record["prompt"] if "before" not in record else f"{number}"
        rows.setdefault(key, (number, record))
    found = list(rows.values())
    if len(found) > count:
        found = [found[index * len(found) // count] for index in range(count)]
    try:
        return [_example(samples, record) for number, record in found]
    except RowError as error:
        raise InputError(f"{table}: {error}") from error


def _example(samples: Path, record: Mapping[str, Any]) -> Example:
    def picture(name: object) -> Embedded:
        return embed(resolve_inside(samples, name))

    names = [key for key in record if key.endswith(SUFFIX) and key != SUFFIX[1:]]
    sides = [Side(key.removesuffix(SUFFIX), picture(record[key]), ()) for key in names[:MAX_SIDES]]
    if not names:
        sides = [
            Side(label, None, _pieces(record, label))
            for label in ("before", "after")
            if isinstance(record.get(label), str)
        ]
    about = picture(record["file_name"]) if "file_name" in record else None
    return Example(record["prompt"], about, sides)


def _pieces(record: Mapping[str, Any], label: str) -> Pieces:
    """Read a text with its wrong pieces where it has them marked."""
    marked = record.get(f"{label}_marked")
    if not isinstance(marked, list):
        return [(record[label], False)]
    pieces = []
    for piece in marked:
        if not isinstance(piece, list) or len(piece) != 2 or not isinstance(piece[0], str):
            raise RowError(f"{label}_marked has a piece that is not a text and true or false")
        pieces.append((piece[0], bool(piece[1])))
    return pieces


def _link(report: Path, output: Path) -> str | None:
    """Address a report from the page; None where a copy of the page's folder would not have it."""
    home = output.resolve().parent
    if not report.is_file() or not report.resolve().is_relative_to(home):
        return None
    return quote(Path(os.path.relpath(report.resolve(), home)).as_posix())


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # JSON has whole numbers of any size
        return None
