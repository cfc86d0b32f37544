"""Less hallucination in one command, on Shapes world: topic overwriting, training, proof."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from mmalign.config import (
    QuickstartVlmConfig,
    ShapesPicturesConfig,
    TopicOverwriteConfig,
    VlmDpoConfig,
)
from mmalign.options import parse_options
from mmalign.pipelines import shapes_pictures, vlm_dpo
from mmalign.pipelines.topic_overwrite import overwrite_topics
from mmalign.report import RunSummary

QUESTIONS = 320  # pictures that pairs are made of
SCENES = 200  # held-out pictures that are described before and after
SHOWN = 16


def run(config: QuickstartVlmConfig) -> None:
    """Let the base model speak, make pairs of what it says, train, listen again, and compare.

    Both jobs run from packaged configurations, `shapes_topics` and `shapes_vlm_dpo`, as they
    would for any other model.
    """
    started = time.monotonic()
    output = Path(config.output_dir or f"runs/quickstart-vlm-{config.preset}-{config.seed}")
    draw = ShapesPicturesConfig(output=str(output / "questions"), count=QUESTIONS, seed=config.seed)
    shapes_pictures.run(draw)
    tqdm.write("1/2  pairs: let the model describe pictures and overwrite facts topic by topic")
    topics: TopicOverwriteConfig = _settings(
        TopicOverwriteConfig,
        "shapes_topics",
        f"--questions={output}/questions/questions.jsonl",
        f"--output_dir={output}/topics",
        f"--seed={config.seed}",
        f"--sampling.seed={config.seed}",
        f"--resampling.seed={config.seed}",
    )
    overwrite_topics(topics)
    tqdm.write(f"2/2  train {config.preset}, and compare with the base on held-out pictures")
    training: VlmDpoConfig = _settings(
        VlmDpoConfig,
        "shapes_vlm_dpo",
        f"--preset={config.preset}",
        f"--output_dir={output}",
        f"--pairs.path={output}/topics/pairs.jsonl",
        f"--seed={config.seed}",
        "--resume_from_checkpoint=latest",  # an interrupted quickstart continues
        "--trial.name=shapes",
        f'--trial.options={{"count": {SCENES}}}',
        f"--num_answers={SHOWN}",
    )
    summary = vlm_dpo.run(training, started=started)
    tqdm.write(table(summary))
    tqdm.write(f"report: {output / 'report.html'}")


def table(summary: RunSummary) -> str:
    """List every measure before and after."""
    lines = [f"{'':18}{'before':>9}{'after':>9}"]
    for name, before in summary.before.items():
        lines.append(f"{name:18}{before:9.3f}{summary.after[name]:9.3f}")
    rate = summary.win_rate
    assert rate is not None  # the trial decides who wins
    low, high = rate.ci95
    lines.append(f"win rate {rate.value:.2f} [{low:.2f}, {high:.2f}], judge {rate.judge}")
    return "\n".join(lines)


def _settings(config_class: type[Any], name: str, *flags: str) -> Any:
    arguments: Sequence[str] = ["--config", name, *flags]
    return parse_options(config_class, arguments, command="quickstart vlm")
