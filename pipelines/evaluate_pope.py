"""`mmalign evaluate pope`: is there an X in the image?"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.hallucination import pope
from mmalign.hallucination.bootstrap import Counts, intervals, totals
from mmalign.hallucination.outcome import Outcome
from mmalign.pipelines._benchmark import Images, Task, Wording, answers_file, as_written, finish
from mmalign.types import InputError, Question

if TYPE_CHECKING:
    from mmalign.config import EvaluatePopeConfig

WORDING = Wording("POPE", "question", "right answer", "images")
COUNTED = {"tp", "fp", "tn", "fn", "unclear"}
"""Metrics that are counts, which have no mean over splits."""


def run(config: EvaluatePopeConfig) -> None:
    """Score answers and write `summary.json`, `report.html` and `cases.jsonl`.

    Raises:
        InputError: naming file and row, for answers or labels that cannot be used, or a split that
            there is not.
    """
    started = time.monotonic()
    labels = label_files(config)
    outcomes = {name: _evaluate(config, name, path) for name, path in labels.items()}
    if len(outcomes) == 1:
        outcome = next(iter(outcomes.values()))
    else:
        outcome = together(outcomes, seed=config.seed, resamples=config.resamples)
    title = f"POPE, {next(iter(labels)) if len(labels) == 1 else 'all splits'}"
    finish(config, outcome, WORDING._replace(title=title), started)


def label_files(config: EvaluatePopeConfig) -> dict[str, Path]:
    """Find the label file of each split that is asked for.

    Raises:
        InputError: for an unknown split, or a label file that is missing.
    """
    splits = (*pope.SPLITS, "all")
    if config.split is not None and config.split not in splits:
        raise InputError(f"split: unknown {config.split[:60]!r}; one of {', '.join(splits)}")
    if config.labels is not None:
        name = next((s for s in pope.SPLITS if s in Path(config.labels).name), "own questions")
        if config.split not in (None, name):
            raise InputError(f"split: {config.split} is not the split of {config.labels}")
        return {config.split or name: Path(config.labels)}
    if config.annotations is None or config.split is None:
        raise InputError("labels: give --labels FILE, or --annotations DIR and --split NAME")
    wanted = pope.SPLITS if config.split == "all" else (config.split,)
    return {name: _label_file(Path(config.annotations), name) for name in wanted}


def together(outcomes: Mapping[str, Outcome], *, seed: int, resamples: int) -> Outcome:
    """Join the splits: metrics of each with its name before them, and plain means of the rates.

    The splits ask about the same images, which are resampled together.
    """
    cases = [
        replace(
            case,
            item=f"{split} {case.item}",
            counts={f"{split}_{name}": count for name, count in case.counts.items()},
        )
        for split, outcome in outcomes.items()
        for case in outcome.cases
    ]

    def statistic(total: Counts) -> dict[str, float]:
        found: dict[str, float] = {}
        parts = [pope.scores(_of_split(total, split)) for split in outcomes]
        for name in (name for name in parts[0] if name not in COUNTED):
            found[name] = sum(part[name] for part in parts) / len(parts)
        for split, part in zip(outcomes, parts, strict=True):
            found |= {f"{split}_{name}": value for name, value in part.items()}
        return found

    return Outcome(
        benchmark="pope",
        metrics=statistic(totals(cases)),
        ci95=intervals(cases, statistic, seed=seed, resamples=resamples),
        cases=cases,
        headline={"f1": "mean F1", **{f"{split}_f1": f"F1, {split}" for split in outcomes}},
        warnings=[f"{s}: {w}" for s, outcome in outcomes.items() for w in outcome.warnings],
    )


def _of_split(total: Counts, split: str) -> dict[str, float]:
    prefix = f"{split}_"
    return {n.removeprefix(prefix): count for n, count in total.items() if n.startswith(prefix)}


def _evaluate(config: EvaluatePopeConfig, split: str, labels: Path) -> Outcome:
    questions = pope.read_questions(labels)
    if config.responses is not None and config.split == "all":
        if "{split}" not in config.responses:
            raise InputError("responses: with --split all, {split} must stand for each split")
        config = replace(config, responses=config.responses.replace("{split}", split))
    path = answers_file(config, lambda: _tasks(config, questions, labels), "answer")
    if config.responses is None and config.split == "all":
        path = path.replace(path.with_name(f"responses_{split}.jsonl"))
    answers, warnings = pope.read_answers(path, questions, labels, config.on_missing)
    outcome = pope.evaluate(
        questions, answers, strict=config.strict, seed=config.seed, resamples=config.resamples
    )
    return replace(outcome, warnings=[*warnings, *outcome.warnings])


def _label_file(folder: Path, split: str) -> Path:
    found = sorted(folder.glob(f"*pope*{split}*.json*"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise InputError(f"annotations: {folder} must have one *pope*{split}*.json, has {names}")
    return found[0]


def _tasks(config: EvaluatePopeConfig, questions: list[pope.Question], labels: Path) -> list[Task]:
    images = Images(config.images)
    return [
        Task(
            Question(
                question.text + config.question_suffix,
                (images.need(question.image, f"{labels} question {question.question_id}"),),
            ),
            {"question_id": as_written(question.question_id), "question": question.text},
        )
        for question in questions
    ]
