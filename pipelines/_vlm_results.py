"""What a run on a vision-language model leaves behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mmalign.config import VlmDpoConfig, dump_config
from mmalign.metrics_log import read_metrics
from mmalign.pipelines._vlm_evaluation import VlmEvaluation
from mmalign.report import (
    Report,
    RunSummary,
    library_versions,
    peak_memory_mib,
    write_model_card,
    write_report,
    write_summary,
)


def write_vlm_results(
    config: VlmDpoConfig,
    evaluation: VlmEvaluation,
    *,
    steps: int,
    wall_seconds: float,
    device: str,
    warnings: Sequence[str],
    cost: Mapping[str, float],
) -> RunSummary:
    """Write `summary.json`, `report.html` and the model card.

    Raises:
        InputError: if the folder cannot be written.
    """
    folder = Path(config.output_dir)
    summary = RunSummary(
        method=f"vlm-dpo {config.preset}",
        model=config.model,
        seed=config.seed,
        steps=steps,
        wall_seconds=wall_seconds,
        peak_memory_mib=peak_memory_mib(device),
        device=device,
        versions=library_versions(),
        before=evaluation.before,
        after=evaluation.after,
        win_rate=evaluation.win_rate,
        cost=cost,
    )
    report = Report(
        summary=summary,
        changes=evaluation.changes,
        answers=evaluation.answers,
        metrics=read_metrics(folder / "metrics.jsonl"),
        config=dump_config(config),
        warnings=warnings,
    )
    write_summary(folder, summary)
    write_report(folder, report)
    write_model_card(folder, summary, lora=config.lora.enabled, task="vlm")
    return summary
