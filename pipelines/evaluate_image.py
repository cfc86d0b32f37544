"""Compare models and folders of images on the same prompts, seeds and judges, and by people."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from mmalign.config import dump_config
from mmalign.data.files import write_bytes
from mmalign.pipelines._evaluation import load_judges, resolve_device
from mmalign.pipelines._label_server import check_page
from mmalign.pipelines._subject_images import Plan, make_images, plan_images
from mmalign.pipelines._subject_page import Comparison, results_text, write_page
from mmalign.pipelines._subject_people import Panel
from mmalign.pipelines._subject_scores import (
    Scorers,
    Scores,
    make_scorers,
    score_subject,
    write_scores,
)
from mmalign.pipelines._subject_stats import PEOPLE, Results, analyse, duel_of, results_json
from mmalign.pipelines._subjects import Subject, list_subjects
from mmalign.report import (
    RunSummary,
    WinRateSummary,
    library_versions,
    peak_memory_mib,
    write_summary,
)
from mmalign.types import InputError

if TYPE_CHECKING:
    from mmalign.config import EvaluateImageConfig


def run(config: EvaluateImageConfig) -> None:
    """Make the images, measure them, ask people if wanted, and write what came of it.

    The folder receives `summary.json`, `results.json`, `report.html`, `config.yaml`, `scores.csv`,
    `scores.json`, and the images in `samples/`, where people's answers are kept as well. Images
    that are there from the same sources are not made again, so the command can be repeated.

    Raises:
        InputError: if there is nothing to compare, or subjects, prompts or rewards cannot be used.
    """
    started = time.monotonic()
    subjects = list_subjects(config)
    if config.evaluation.prompts is None and all(s.images is None for s in subjects):
        raise InputError("evaluation.prompts is missing: give a file with one prompt per line")
    if config.judge == "label":
        check_page(config.label)
    device = resolve_device(config.device)
    scorers = make_scorers(load_judges(config.evaluation, device))
    planned = plan_images(config, subjects)
    for note in planned.notes:
        tqdm.write(note)
    folder = Path(config.output_dir)
    files = make_images(subjects, planned, folder / "samples", device)
    scores = [
        score_subject(subject, planned.rows, own, scorers, device)
        for subject, own in zip(subjects, files, strict=True)
    ]
    write_scores(folder, subjects, planned.rows, files, scores)
    panel = Panel(folder / "samples", planned.rows, files, config.label.images_per_prompt)
    job = _Job(config, subjects, planned, files, scores, scorers, panel, device, started)
    text = _write(folder, job)
    if config.judge == "label":
        panel.ask(config.label)
        text = _write(folder, job)
    tqdm.write(text)
    tqdm.write(f"report: {folder / 'report.html'}")


@dataclass(frozen=True)
class _Job:
    """What a page is written of, before and after people have answered."""

    config: EvaluateImageConfig
    subjects: Sequence[Subject]
    planned: Plan
    files: Sequence[Sequence[Path]]
    scores: Sequence[Scores]
    scorers: Scorers
    panel: Panel
    device: str
    started: float


def _write(folder: Path, job: _Job) -> str:
    """Write everything that depends on answers; returns it as lines of text."""
    config, seed = job.config, job.config.sampling.seed
    rewards, judge = job.scorers
    results = analyse(
        job.planned.rows,
        job.scores,
        rewards=[one.name for one in rewards],
        judge=None if judge is None else judge.name,
        answers=job.panel.answers(seed),
        seed=seed,
    )
    settings = dump_config(replace(config, label=replace(config.label, token=None)))
    comparison = Comparison(
        subjects=job.subjects,
        rows=job.planned.rows,
        files=job.files,
        scores=job.scores,
        results=results,
        summary=_summary(job, results),
        notes=job.planned.notes,
        config=settings,
    )
    found = json.dumps(results_json(results, comparison.names), indent=1, ensure_ascii=False)
    write_bytes(folder / "results.json", (found + "\n").encode())
    write_bytes(folder / "config.yaml", settings.encode())
    write_summary(folder, comparison.summary)
    write_page(folder, comparison)
    return results_text(comparison)


def _summary(job: _Job, results: Results) -> RunSummary:
    """Sum up the last subject against the baseline; `results.json` has all of them."""
    last, tested = len(job.subjects) - 1, job.subjects[-1]
    before, after = (
        {metric.name: metric.means[number].value for metric in results.metrics}
        for number in (0, last)
    )
    judge = PEOPLE if results.people is not None else results.judge
    duel = duel_of(results.duels.get(judge or "", []), last, 0)
    return RunSummary(
        method="evaluate",
        model=tested.source if tested.model is None else tested.model.model,
        seed=job.config.sampling.seed,
        steps=0,
        wall_seconds=time.monotonic() - job.started,
        peak_memory_mib=peak_memory_mib(job.device),
        device=job.device,
        versions=library_versions(),
        before=before,
        after=after,
        win_rate=WinRateSummary(judge=judge, **duel.rate._asdict()) if duel and judge else None,
        metrics=after,
        ci95={metric.name: metric.means[last].ci95 for metric in results.metrics},
    )
