"""Evaluation as every image pipeline does it: sample both sides, measure, write what was found."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from mmalign.data.files import write_jsonl
from mmalign.data.images import save_png
from mmalign.data.prompts import read_prompts
from mmalign.evaluation import Evaluation, Verdict, evaluate_models, plan, sample_images
from mmalign.metrics_log import read_metrics
from mmalign.report import (
    Comparison,
    Picture,
    Report,
    RunSummary,
    WinRateSummary,
    library_versions,
    peak_memory_mib,
    write_model_card,
    write_report,
    write_summary,
)
from mmalign.rewards import load_reward, load_rewards
from mmalign.types import InputError

if TYPE_CHECKING:
    from mmalign.config import EvalConfig, RewardConfig, SamplingConfig
    from mmalign.types import ImageAdapter, Reward


class Judges(NamedTuple):
    """The rewards that are reported, and the one that decides who wins."""

    rewards: list[tuple[Reward, RewardConfig]]
    judge: Reward | None


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What was run: everything in a run's summary and report that is not measured on images.

    Attributes:
        method: preference method.
        model: model as the user named it.
        seed: base seed.
        steps: optimizer steps done.
        wall_seconds: duration of the run.
        device: torch device.
        config: resolved configuration as YAML.
        warnings: what training warned about.
        cost: what training spent.
        lora: whether a LoRA was trained, not the whole model.
    """

    method: str
    model: str
    seed: int
    steps: int
    wall_seconds: float
    device: str
    config: str
    warnings: Sequence[str] = ()
    cost: Mapping[str, float] | None = None
    lora: bool = True


def resolve_device(name: str) -> str:
    """Turn `auto` into the accelerator that is there, else `cpu`; each process has its own."""
    if name not in ("auto", "cuda"):
        return name
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return "cpu" if name == "auto" else name
    local = os.environ.get("LOCAL_RANK")
    return accelerator.type if local is None else f"{accelerator.type}:{local}"


def check_judge(rewards: Sequence[RewardConfig], config: EvalConfig) -> None:
    """Refuse a judge that is trained on.

    Raises:
        InputError: one of the training rewards is the judge.
    """
    judge = config.judge
    for reward in rewards:
        same = judge is not None and (reward.name, reward.options) == (judge.name, judge.options)
        if same and not reward.eval_only:
            raise InputError(
                f"evaluation.judge: {reward.name} is trained on; name a judge no training sees"
            )


def evaluation_prompts(config: EvalConfig) -> list[str]:
    """Read the prompts of an evaluation.

    Raises:
        InputError: if none are given or they cannot be read.
    """
    if config.prompts is None:
        raise InputError("evaluation.prompts is missing: give a file with one prompt per line")
    return read_prompts(config.prompts, config.num_prompts)


def judge_rewards(config: EvalConfig, device: str) -> Judges:
    """Load the rewards and the judge of an evaluation.

    Raises:
        InputError: if the prompts cannot be read or a reward cannot be loaded. Long training should
            not run into that at its end, so call this before it.
    """
    if config.prompts is None:
        return Judges([], None)
    evaluation_prompts(config)
    return load_judges(config, device)


def load_judges(config: EvalConfig, device: str) -> Judges:
    """Load the rewards and the judge, whether or not there is a file of prompts.

    Raises:
        InputError: if a reward cannot be loaded.
    """
    place = resolve_device(device)
    judge = load_reward(config.judge, place) if config.judge is not None else None
    return Judges(load_rewards(config.rewards, place), judge)


def sample_side(
    adapter: ImageAdapter, config: EvalConfig, sampling: SamplingConfig, description: str
) -> Tensor | None:
    """Sample the evaluation images of one model, (N, 3, H, W); None without prompts.

    Seeds depend on prompt and index alone, so both sides share them.
    """
    if config.prompts is None:
        return None
    prompts, seeds = plan(evaluation_prompts(config), config.images_per_prompt, sampling.seed)
    return sample_images(adapter, prompts, seeds, sampling, description)


def measure(
    before: Tensor | None, after: Tensor | None, config: EvalConfig, judges: Judges, seed: int
) -> Evaluation | None:
    """Compare the images of two `sample_side` calls; None without prompts.

    Raises:
        InputError: naming reward and image, for a score that is not a finite number.
    """
    if before is None or after is None:
        return None
    return evaluate_models(
        before,
        after,
        evaluation_prompts(config),
        rewards=judges.rewards,
        judge=judges.judge,
        images_per_prompt=config.images_per_prompt,
        seed=seed,
    )


def write_results(folder: Path, subject: Subject, evaluation: Evaluation | None) -> RunSummary:
    """Write `summary.json`, `report.html`, `samples/` and the model card.

    Curves come from `metrics.jsonl` and `evaluations.jsonl` in the folder, where they are.

    Raises:
        InputError: if the folder cannot be written.
    """
    summary = RunSummary(
        method=subject.method,
        model=subject.model,
        seed=subject.seed,
        steps=subject.steps,
        wall_seconds=subject.wall_seconds,
        peak_memory_mib=peak_memory_mib(subject.device),
        device=subject.device,
        versions=library_versions(),
        before={} if evaluation is None else evaluation.before,
        after={} if evaluation is None else evaluation.after,
        win_rate=None if evaluation is None else _win_rate(evaluation),
        cost=subject.cost,
    )
    pairs = [] if evaluation is None else comparisons(evaluation)
    changes = {} if evaluation is None else evaluation.changes
    report = Report(
        summary=summary,
        changes={name: change.ci95 for name, change in changes.items()},
        comparisons=pairs,
        metrics=read_metrics(folder / "metrics.jsonl"),
        curve=read_metrics(folder / "evaluations.jsonl"),
        rewards=[] if evaluation is None else evaluation.rewards,
        config=subject.config,
        warnings=subject.warnings,
    )
    if pairs:
        save_samples(folder / "samples", pairs)
    write_summary(folder, summary)
    write_report(folder, report)
    write_model_card(folder, summary, lora=subject.lora)
    return summary


def comparisons(evaluation: Evaluation) -> list[Comparison]:
    """List the images side by side with the judge's verdicts."""
    found = []
    silent = Verdict(0.0, "", None)
    for index, (prompt, seed) in enumerate(zip(evaluation.prompts, evaluation.seeds, strict=True)):
        judged = evaluation.judge is not None
        before = evaluation.verdicts_before[index] if judged else silent
        after = evaluation.verdicts_after[index] if judged else silent
        difference = after.score - before.score
        outcome = "after wins" if difference > 0 else "before wins" if difference < 0 else "tie"
        found.append(
            Comparison(
                prompt=prompt,
                seed=seed,
                before=_picture(evaluation.images_before[index], before),
                after=_picture(evaluation.images_after[index], after),
                outcome=outcome if judged else "",
            )
        )
    return found


def save_samples(folder: Path, pairs: Sequence[Comparison]) -> None:
    """Write `before/*.png`, `after/*.png` and a `metadata.jsonl` that names prompt and seed.

    Raises:
        InputError: if the folder cannot be written.
    """
    rows = []
    for index, pair in enumerate(pairs):
        row: dict[str, object] = {"prompt": pair.prompt, "seed": pair.seed}
        for side, picture in (("before", pair.before), ("after", pair.after)):
            name = f"{side}/{index:05d}.png"
            save_png(picture.image, folder / name)
            row |= {f"{side}_file_name": name, f"{side}_verdict": picture.verdict}
        rows.append(row)
    write_jsonl(folder / "metadata.jsonl", rows)


def results_table(evaluation: Evaluation) -> str:
    """Lay out before, after and change per metric, and the win rate, as lines of text."""
    width = max(len(name) for name in ["metric", *evaluation.before])
    lines = [f"{'metric':<{width}}  {'before':>9}  {'after':>9}  change [95 % interval]"]
    for name, before in evaluation.before.items():
        change = evaluation.changes[name]
        lines.append(
            f"{name:<{width}}  {before:>9.4g}  {evaluation.after[name]:>9.4g}  "
            f"{change.value:+.4g} [{change.ci95[0]:+.3g}, {change.ci95[1]:+.3g}]"
        )
    rate = evaluation.win_rate
    if rate is not None and rate.wins + rate.losses:
        lines.append(
            f"win rate {rate.value:.2f} [{rate.ci95[0]:.2f}, {rate.ci95[1]:.2f}] by "
            f"{evaluation.judge}: {rate.wins} wins, {rate.losses} losses, {rate.ties} ties"
        )
    elif rate is not None:
        lines.append(f"win rate undecided: {evaluation.judge} called all {rate.n} pairs a tie")
    return "\n".join(lines)


def _win_rate(evaluation: Evaluation) -> WinRateSummary | None:
    if evaluation.win_rate is None or evaluation.judge is None:
        return None
    return WinRateSummary(judge=evaluation.judge, **evaluation.win_rate._asdict())


def _picture(image: Tensor, verdict: Verdict) -> Picture:
    return Picture(image=image, verdict=verdict.text, good=verdict.correct)
