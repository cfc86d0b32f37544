"""`mmalign evaluate amber`: objects of descriptions, and yes/no questions."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.hallucination import amber
from mmalign.hallucination.bootstrap import intervals, totals
from mmalign.hallucination.matching import spacy_similar
from mmalign.hallucination.outcome import Case, Outcome
from mmalign.hallucination.records import (
    Record,
    check_complete,
    check_known,
    id_field,
    read_records,
    text_field,
    without_doubles,
)
from mmalign.pipelines._benchmark import Images, Task, Wording, answers_file, as_written, finish
from mmalign.types import InputError, Question

if TYPE_CHECKING:
    from mmalign.config import EvaluateAmberConfig

WORDING = Wording("AMBER", "id", "truth", "answers")
QUERIES = ("query_all.json", "query_generative.json", "query_discriminative.json")


def run(config: EvaluateAmberConfig) -> None:
    """Score answers and write `summary.json`, `report.html` and `cases.jsonl`.

    Raises:
        InputError: naming file and row, for answers or annotations that cannot be used.
    """
    started = time.monotonic()
    folder = _folder(config)
    similar = spacy_similar(config.similarity_score) if config.matching == "spacy" else None
    truth = amber.read_amber(folder)
    path = answers_file(config, lambda: _tasks(config, folder, truth), "response")
    answers = without_doubles((id_field(row, "id"), row) for row in read_records(path))
    check_known(answers, truth.annotations, str(folder / "annotations.json"))
    warnings = _complete(config, path, answers, truth)
    described: list[Case] = []
    asked: list[Case] = []
    for key, row in answers.items():
        known, text = truth.annotations[key], text_field(row, "response", "answer", "text")
        if known.category == "generative":
            described.append(
                amber.generative_case(known, text, truth, strict=config.strict, similar=similar)
            )
        else:
            asked.append(amber.discriminative_case(known, text, strict=config.strict))
    finish(config, outcome_of(config, described, asked), WORDING, started, warnings)


def outcome_of(
    config: EvaluateAmberConfig, described: Sequence[Case], asked: Sequence[Case]
) -> Outcome:
    """Compute the metrics of both halves; each is resampled by itself."""
    metrics: dict[str, float] = {}
    ci95: dict[str, tuple[float, float]] = {}
    headline: dict[str, str] = {}
    warnings: list[str] = []
    settings = {"seed": config.seed, "resamples": config.resamples}
    if asked:
        metrics |= amber.discriminative_scores(totals(asked))
        ci95 |= intervals(asked, amber.discriminative_scores, **settings)
        headline |= {name: title for name, title in {"f1": "F1"}.items() if name in metrics}
        warnings += _reading_warnings(config, asked, metrics)
    if described:
        metrics |= amber.generative_scores(totals(described))
        ci95 |= intervals(described, amber.generative_scores, **settings)
        headline = {"chair": "CHAIR", "cover": "Cover", "hal": "Hal", "cog": "Cog"} | headline
    elif asked:
        metrics["length"] = metrics["discriminative_length"]
        ci95["length"] = ci95["discriminative_length"]
        headline = {"accuracy": "accuracy", **headline} if "accuracy" in metrics else headline
    if not headline:
        headline = {name: name.replace("_", " ") for name in metrics if name.endswith("_f1")}
    return Outcome(
        benchmark="amber",
        metrics=amber.always(metrics),
        ci95=ci95,
        cases=[*described, *asked],
        headline=headline,
        warnings=warnings,
    )


def _reading_warnings(
    config: EvaluateAmberConfig, asked: Sequence[Case], metrics: Mapping[str, float]
) -> list[str]:
    warnings = []
    other = sum(case.counts["read_differently"] for case in asked)
    if other:
        second = "fixed" if config.strict == "official" else "official"
        warnings.append(
            f"{other:.0f} of {len(asked)} yes/no answers read differently with strict {second}"
        )
    if metrics["no_rate"] > 0.9:
        warnings.append(
            f"the model says no to {metrics['no_rate']:.0%} of the questions: always no has "
            "accuracy 66.3 and F1 79.7 over all of them"
        )
    return warnings


def _folder(config: EvaluateAmberConfig) -> Path:
    if config.annotations is not None:
        return Path(config.annotations)
    if config.labels is not None:
        return Path(config.labels).parent
    raise InputError(
        "annotations: give --annotations DIR with annotations.json, relation.json, safe_words.txt"
    )


def _complete(
    config: EvaluateAmberConfig, path: Path, answers: Mapping[str, Record], truth: amber.Amber
) -> list[str]:
    """Check that there is an answer to everything that is asked for."""
    there = {truth.annotations[key].category for key in answers}
    if config.evaluation_type == "auto":
        wanted = there
    else:
        wanted = set(amber.DIMENSIONS[config.evaluation_type])
    ids = [key for key, known in truth.annotations.items() if known.category in wanted]
    return check_complete(path, answers, ids, config.on_missing)


def _tasks(config: EvaluateAmberConfig, folder: Path, truth: amber.Amber) -> list[Task]:
    """Take the questions of AMBER's own files, of the dimensions that are asked for."""
    kind = "a" if config.evaluation_type == "auto" else config.evaluation_type
    images = Images(config.images)
    found: dict[str, Task] = {}
    for file in (folder / name for name in QUERIES if (folder / name).is_file()):
        for record in read_records(file):
            key = id_field(record, "id")
            if key not in truth.annotations:
                raise InputError(f"{record.where}: id {key} is not in annotations.json")
            category = truth.annotations[key].category
            if category not in amber.DIMENSIONS[kind]:
                continue
            text = text_field(record, "query")
            suffix = "" if category == "generative" else config.question_suffix
            image = images.need(text_field(record, "image"), record.where)
            found[key] = Task(Question(text + suffix, (image,)), {"id": as_written(key)})
    if not found:
        raise InputError(f"{folder} has no questions ({', '.join(QUERIES)}) of type {kind}")
    return list(found.values())
