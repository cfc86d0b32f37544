"""What every hallucination benchmark does: get the answers, write what was found."""

from __future__ import annotations

import base64
import io
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm.auto import tqdm

from mmalign.config import dump_config
from mmalign.data.files import check_inside, write_bytes, write_jsonl
from mmalign.data.images import SUFFIXES, hash_image, open_image
from mmalign.data.schema import RowError
from mmalign.hallucination.kept import KeptReplies
from mmalign.hallucination.outcome import Case, Outcome, worst_first
from mmalign.hallucination.records import clean, image_id
from mmalign.report import RunSummary, library_versions, peak_memory_mib, render, write_summary
from mmalign.types import ImageRef, InputError, Question

if TYPE_CHECKING:
    from mmalign.config import BenchmarkConfig

BESIDE = {
    "length": "words per answer",
    "yes_rate": "says yes",
    "no_rate": "says no",
    "coverage": "coverage",
}
"""What always stands beside the score."""
SHOWN_CASES = 40
PICTURE_PIXELS = 440
SAVED_EVERY = 4
"""Batches between two savings of a model's answers."""

logger = logging.getLogger(__name__)


class Task(NamedTuple):
    """A question to a model, and the fields of its row in the file of answers."""

    question: Question
    row: Mapping[str, Any]


def as_written(name: str) -> int | str:
    """Write an id as the official files do: numbers as numbers."""
    return int(name) if name.isdecimal() and name.isascii() else name


class Wording(NamedTuple):
    """Words of a benchmark's page."""

    title: str
    item: str
    truth: str
    resampled: str


def answers_file(config: BenchmarkConfig, tasks: Callable[[], Sequence[Task]], key: str) -> Path:
    """Find the file of answers, or have the model write one.

    Args:
        config: names either the answers or the model.
        tasks: lists the questions for a model.
        key: field of the answer in the file that is written, `responses.jsonl`.

    Raises:
        InputError: if neither or both are given, or the model or an image cannot be used.
    """
    if config.responses is not None and config.model:
        raise InputError("give --responses or --model, not both: which answers are meant?")
    if config.responses is not None:
        return Path(config.responses)
    if not config.model:
        raise InputError("responses: give --responses FILE, or --model DIR to get answers from")
    asked = tasks()
    path = Path(config.output_dir) / "responses.jsonl"
    answers = generate_responses(config, [task.question for task in asked])
    rows = zip(asked, answers, strict=True)
    write_jsonl(path, [{**task.row, key: clean(answer)} for task, answer in rows])
    return path


def generate_responses(config: BenchmarkConfig, questions: Sequence[Question]) -> list[str]:
    """Have the model answer questions, with a bar.

    Answers are kept in `model_answers.jsonl` as they come, keyed by model, settings, question and
    image: the same command again goes on where it was interrupted.

    Raises:
        InputError: if the model or an image cannot be used.
    """
    from mmalign.adapters import load_vlm
    from mmalign.pipelines._evaluation import resolve_device

    adapter = load_vlm(config, resolve_device(config.device))
    adapter.max_pixels = config.max_pixels
    kept = KeptReplies(Path(config.output_dir) / "model_answers.jsonl")
    name = f"{adapter.fingerprint} {config.dtype} {sorted(asdict(config.generation).items())}"
    keys = [kept.key(name, q.prompt, *map(_image_key, q.images)) for q in questions]
    waiting = [index for index, key in enumerate(keys) if kept.get(key) is None]
    size = config.generation.batch_size * SAVED_EVERY
    with tqdm(total=len(questions), desc="answer", unit="question") as bar:
        bar.update(len(questions) - len(waiting))
        for start in range(0, len(waiting), size):
            part = waiting[start : start + size]
            answers = adapter.generate([questions[i] for i in part], config.generation)
            kept.keep((keys[i], answer) for i, answer in zip(part, answers, strict=True))
            bar.update(len(part))
    return [kept.get(key) or "" for key in keys]


class Images:
    """The images of a folder, found by file name, its stem, or the id inside COCO's names."""

    def __init__(self, folder: str | None) -> None:
        """List the folder; nothing without one.

        Raises:
            InputError: if it has no images.
        """
        self.folder = folder
        self._paths: dict[str, Path] = {}
        if folder is None:
            return
        if not Path(folder).is_dir():
            raise InputError(f"images: {folder} is not a folder")
        paths = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in SUFFIXES)
        if not paths:
            raise InputError(f"images: {folder} has no images")
        for path in paths:
            for name in (path.name, path.stem, image_id(path.name)):
                self._paths.setdefault(name, path)

    def names(self) -> list[str]:
        """List the ids of all images, each once."""
        return list(dict.fromkeys(image_id(path.stem) for path in self._paths.values()))

    def find(self, name: str) -> ImageRef | None:
        """Look up an image; None when it is not there.

        Raises:
            InputError: if it is a link out of the folder.
        """
        path = self._paths.get(name) or self._paths.get(image_id(name))
        if path is None or self.folder is None:
            return None
        try:
            return ImageRef(check_inside(Path(self.folder), path), str(path))
        except RowError as error:
            raise InputError(f"images: {error}") from error

    def need(self, name: str, where: str) -> ImageRef:
        """Look up an image.

        Raises:
            InputError: naming the row that wants it, if there is no such image.
        """
        if self.folder is None:
            raise InputError("images: give --images DIR for the model to look at")
        found = self.find(name)
        if found is None:
            raise InputError(f"{where}: no image {name[:80]!r} in {self.folder}")
        return found


def finish(
    config: BenchmarkConfig,
    outcome: Outcome,
    wording: Wording,
    started: float,
    warnings: Sequence[str] = (),
) -> None:
    """Write `summary.json`, `report.html` and `cases.jsonl`, and print the scores.

    Raises:
        InputError: if the folder cannot be written.
    """
    folder = Path(config.output_dir)
    summary = RunSummary(
        method=f"evaluate {outcome.benchmark}",
        model=config.model or str(config.responses),
        seed=config.seed,
        steps=0,
        wall_seconds=time.monotonic() - started,
        peak_memory_mib=peak_memory_mib(),
        device="cpu" if not config.model else config.device,
        versions=library_versions(),
        before={},
        after={},
        win_rate=None,
        metrics=outcome.metrics,
        ci95=outcome.ci95,
    )
    said = [*warnings, *outcome.warnings, *_empty(outcome.cases)]
    write_jsonl(folder / "cases.jsonl", [_case_row(case) for case in outcome.cases])
    page = _page(config, outcome, wording, summary, said)
    write_bytes(folder / "report.html", page.encode())
    write_summary(folder, summary)
    for warning in said:
        logger.warning("%s", warning)
    tqdm.write(scores_table(outcome))
    tqdm.write(f"report: {folder / 'report.html'}")


def _empty(cases: Sequence[Case]) -> list[str]:
    """Say how many answers are empty: most scores count them as harmless."""
    empty = sum(not case.answer.strip() for case in cases)
    return [f"{empty:,} of {len(cases):,} answers are empty"] if empty else []


def scores_table(outcome: Outcome) -> str:
    """Lay out the scores, and what always stands beside them, as lines of text."""
    names = [*outcome.headline, *BESIDE]
    width = max(map(len, names))
    lines = [f"{outcome.benchmark:<{width}}      value  95 % interval"]
    for name in dict.fromkeys(names):
        value = outcome.metrics.get(name, math.nan)
        if not math.isfinite(value):
            lines.append(f"{name:<{width}}  {'-':>9}")
            continue
        low, high = outcome.ci95.get(name, (math.nan, math.nan))
        lines.append(f"{name:<{width}}  {value:>9.4g}  [{low:.4g}, {high:.4g}]")
    return "\n".join(lines)


def _page(
    config: BenchmarkConfig,
    outcome: Outcome,
    wording: Wording,
    summary: RunSummary,
    warnings: Sequence[str],
) -> str:
    images = Images(config.images)
    shown = worst_first(outcome.cases, SHOWN_CASES)
    tiles = [
        {
            "name": title,
            "value": outcome.metrics.get(name),
            "ci95": outcome.ci95.get(name),
            "beside": name in BESIDE,
        }
        for name, title in {**outcome.headline, **BESIDE}.items()
    ]
    return render(
        "benchmark.html.j2",
        summary=summary,
        title=wording.title,
        item_name=wording.item,
        truth_name=wording.truth,
        resampled=wording.resampled,
        tiles=tiles,
        warnings=warnings,
        answers=len(outcome.cases),
        wrong=sum(case.badness > 0 for case in outcome.cases),
        marked=any(case.spans for case in shown),
        shown=[
            {
                "item": case.item,
                "question": case.question,
                "parts": _parts(case),
                "verdict": case.verdict,
                "truth": case.truth,
                "picture": _picture(images.find(case.image or case.item), config.max_pixels),
            }
            for case in shown
        ],
        config=dump_config(config),
    )


def _parts(case: Case) -> list[tuple[str, str]]:
    """Cut an answer at its marks: texts, each with what it is marked as, or nothing."""
    parts: list[tuple[str, str]] = []
    at = 0
    for span in case.spans:
        if span.start < at or span.stop <= span.start:
            continue
        parts += [
            (case.answer[at : span.start], ""),
            (case.answer[span.start : span.stop], span.kind),
        ]
        at = span.stop
    parts.append((case.answer[at:], ""))
    return [(text, kind) for text, kind in parts if text]


def _picture(ref: ImageRef | None, max_pixels: int) -> str:
    """Encode an image as a data URI; nothing where there is none or it cannot be read."""
    if ref is None:
        return ""
    try:
        image = open_image(ref, max_pixels=max_pixels)
    except InputError as error:
        logger.warning("%s", error)
        return ""
    image.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _image_key(image: object) -> str:
    assert isinstance(image, ImageRef)  # as `Images` finds them
    return hash_image(image).hex()


def _case_row(case: Case) -> dict[str, Any]:
    row = asdict(case) | {"spans": [span._asdict() for span in case.spans]}
    row["counts"] = {name: float(value) for name, value in case.counts.items()}
    return row
