"""Less hallucination in one command, on Shapes world: topic overwriting, training, proof."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from mmalign.adapters import load_vlm
from mmalign.config import (
    EVALUATION_SEED,
    QuickstartVlmConfig,
    TopicOverwriteConfig,
    VlmDpoConfig,
    VlmModelConfig,
    dump_config,
)
from mmalign.data.files import write_jsonl
from mmalign.metrics_log import read_metrics
from mmalign.options import parse_options
from mmalign.pipelines import vlm_dpo
from mmalign.pipelines._evaluation import resolve_device
from mmalign.pipelines._speech_trial import JUDGE, SpeechResult, SpeechTrial, Spoken
from mmalign.pipelines._vlm_results import save_answers
from mmalign.pipelines.topic_overwrite import overwrite_topics
from mmalign.report import (
    Report,
    RunSummary,
    WinRateSummary,
    write_model_card,
    write_report,
    write_summary,
)
from mmalign.shapes.companions import scene_set
from mmalign.shapes.render import render

QUESTIONS = 160  # pictures that pairs are made of
SCENES = 200  # held-out pictures that are described before and after
SHOWN = 16


def run(config: QuickstartVlmConfig) -> None:
    """Let the base model speak, make pairs of what it says, train, listen again, and compare.

    Both jobs run from packaged configurations, `shapes_topics` and `shapes_vlm_dpo`, as they
    would for any other model.
    """
    started = time.monotonic()
    output = Path(config.output_dir or f"runs/quickstart-vlm-{config.preset}-{config.seed}")
    write_questions(output / "questions", QUESTIONS, config.seed)
    tqdm.write("1/3  pairs: let the model describe pictures and overwrite facts topic by topic")
    topics: TopicOverwriteConfig = _settings(
        TopicOverwriteConfig,
        "shapes_topics",
        f"--questions={output}/questions/questions.jsonl",
        f"--output_dir={output}/topics",
        f"--seed={config.seed}",
        f"--sampling.seed={config.seed}",
        f"--resampling.seed={config.seed}",
        "--sampling.temperature=1.0",  # what greedy captions may say has to be sampled often
        "--min_topics=1",
        "--responses=6",
        "--chunk=80",
        "--sampling.batch_size=96",
        "--resampling.batch_size=96",
    )
    overwrite_topics(topics)
    tqdm.write(f"2/3  train {config.preset}")
    training: VlmDpoConfig = _settings(
        VlmDpoConfig,
        "shapes_vlm_dpo",
        f"--preset={config.preset}",
        f"--output_dir={output}",
        f"--pairs.path={output}/topics/pairs.jsonl",
        f"--seed={config.seed}",
        "--resume_from_checkpoint=latest",  # an interrupted quickstart continues
    )
    summary = vlm_dpo.run(training)
    tqdm.write("3/3  compare with the base on held-out pictures")
    trial = SpeechTrial(SCENES, config.seed + EVALUATION_SEED, training.generation)
    sides = [_listen(trial, training, name) for name in (None, str(output / "adapter"))]
    result = trial.compare(sides[0], sides[1], SHOWN)
    summary = _summarize(summary, result, time.monotonic() - started)
    _write(output, training, summary, result)
    tqdm.write(table(result))
    tqdm.write(f"report: {output / 'report.html'}")


def write_questions(folder: Path, count: int, seed: int) -> None:
    """Draw pictures of training compositions and ask for a description of each.

    Writes `questions.jsonl` and `images/`, as `mmalign pairs topics` reads them.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, scene in enumerate(scene_set("train", count, seed)):
        name = f"images/{number:04d}.png"
        render(scene).save(folder / name)
        rows.append({"id": f"{number:04d}", "image": name, "prompt": "Describe the picture."})
    write_jsonl(folder / "questions.jsonl", rows)


def table(result: SpeechResult) -> str:
    """List every measure before and after."""
    lines = [f"{'':18}{'before':>9}{'after':>9}"]
    for name, before in result.before.items():
        lines.append(f"{name:18}{before:9.3f}{result.after[name]:9.3f}")
    low, high = result.win_rate.ci95
    lines.append(f"win rate {result.win_rate.value:.2f} [{low:.2f}, {high:.2f}], judge {JUDGE}")
    return "\n".join(lines)


def _listen(trial: SpeechTrial, training: VlmDpoConfig, adapter: str | None) -> Spoken:
    settings = VlmModelConfig(model=training.model, adapter=adapter, device=training.device)
    return trial.listen(load_vlm(settings, resolve_device(training.device)))


def _summarize(summary: RunSummary, result: SpeechResult, wall_seconds: float) -> RunSummary:
    return replace(
        summary,
        wall_seconds=wall_seconds,
        before={**summary.before, **result.before},
        after={**summary.after, **result.after},
        win_rate=WinRateSummary(
            value=result.win_rate.value,
            ci95=result.win_rate.ci95,
            judge=JUDGE,
            n=result.win_rate.n,
            wins=result.win_rate.wins,
            losses=result.win_rate.losses,
            ties=result.win_rate.ties,
            value_with_ties=result.win_rate.value_with_ties,
        ),
    )


def _write(output: Path, training: VlmDpoConfig, summary: RunSummary, result: SpeechResult) -> None:
    report = Report(
        summary=summary,
        changes={name: change.ci95 for name, change in result.changes.items()},
        answers=result.answers,
        metrics=read_metrics(output / "metrics.jsonl"),
        config=dump_config(training),
    )
    save_answers(output / "samples", result.answers)
    write_summary(output, summary)
    write_report(output, report)
    write_model_card(output, summary, lora=training.lora.enabled, task="vlm")


def _settings(config_class: type[Any], name: str, *flags: str) -> Any:
    arguments: Sequence[str] = ["--config", name, *flags]
    return parse_options(config_class, arguments, command="quickstart vlm")
