"""Compare a model with its base, or two adapters, on the same prompts and seeds."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from mmalign.adapters import load_adapter
from mmalign.config import dump_config
from mmalign.pipelines._evaluation import (
    Subject,
    judge_rewards,
    measure,
    resolve_device,
    results_table,
    sample_side,
    write_results,
)
from mmalign.types import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from mmalign.config import EvaluateImageConfig


def run(config: EvaluateImageConfig) -> None:
    """Sample both sides, measure them, and write `summary.json`, `report.html` and `samples/`.

    Raises:
        InputError: if both sides are the same, or prompts, models, adapters or rewards cannot be
            used.
    """
    if config.adapter == config.base_adapter:
        raise InputError(
            "nothing to compare: give --adapter (and --base_adapter to compare two adapters)"
        )
    if config.evaluation.prompts is None:
        raise InputError("evaluation.prompts is missing: give a file with one prompt per line")
    started = time.monotonic()
    device = resolve_device(config.device)
    judges = judge_rewards(config.evaluation, device)
    base = replace(config, adapter=config.base_adapter, adapter_scale=1.0)
    before = _sample(base, device, "sample base")
    after = _sample(config, device, "sample adapter")
    result = measure(before, after, config.evaluation, judges, config.sampling.seed)
    assert result is not None  # there are prompts
    subject = Subject(
        method="evaluate",
        model=config.model,
        seed=config.sampling.seed,
        steps=0,
        wall_seconds=time.monotonic() - started,
        device=device,
        config=dump_config(config),
    )
    folder = Path(config.output_dir)
    write_results(folder, subject, result)
    tqdm.write(results_table(result))
    tqdm.write(f"report: {folder / 'report.html'}")


def _sample(config: EvaluateImageConfig, device: str, description: str) -> Tensor | None:
    adapter = load_adapter(config, device=device, for_training=False)
    return sample_side(adapter, config.evaluation, config.sampling, description)
