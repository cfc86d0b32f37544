"""A training run of an image generator, from the model folder to the run folder.

Every method gives a `Job`: its steps and their batches. Adapter, reference, trainer, comparison
with the base and report are wired here.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from mmalign import sharding, zero
from mmalign.accelerator import make_accelerator, prepare_model, track_evaluation
from mmalign.adapters import load_adapter, no_file_bars
from mmalign.checkpoint import list_checkpoints
from mmalign.config import RunConfig, changed_options, dump_config
from mmalign.data.files import clear_leftovers, write_bytes
from mmalign.data.order import BatchPlan
from mmalign.evaluation import Evaluation
from mmalign.lora import attach_lora, save_lora
from mmalign.pipelines._curve import Curve
from mmalign.pipelines._evaluation import (
    Judges,
    Subject,
    evaluation_prompts,
    judge_rewards,
    measure,
    results_table,
    sample_side,
    write_results,
)
from mmalign.pipelines._kl import base_of, kl_to_base
from mmalign.pipelines._meter import CostMeter
from mmalign.processes import from_main
from mmalign.reference import Reference, make_reference
from mmalign.report import RunSummary
from mmalign.sharding import unwrapped
from mmalign.trainer import Trainer
from mmalign.training_state import Stateful
from mmalign.types import ImageAdapter, InputError, StepOutput

Step = Callable[[Any], StepOutput]
MAY_CHANGE = {
    *("output_dir", "resume_from_checkpoint", "max_steps", "save_steps", "save_total_limit"),
    *("logging_steps", "report_to", "num_workers", "device", "offline", "evaluation"),
    *("eval_pairs", "generation", "num_answers", "image_cache_mib", "cache_dir"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "ddp_timeout"),
}
"""Options that a continued run may have changed without another result being expected."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a method's step works with.

    `meter` counts what training costs. `state` holds what belongs in the checkpoint besides the
    weights; a step may add to it. `options` is a hash of the options that may move a result.
    """

    adapter: ImageAdapter
    reference: Reference
    accelerator: Accelerator
    meter: CostMeter
    state: dict[str, Stateful]
    options: str = ""

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters being trained."""
        return [p for p in self.adapter.denoiser.parameters() if p.requires_grad]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a method does.

    Attributes:
        run: what it works with.
        step: loss and metrics of one micro-batch.
        batches: given the number of optimizer steps done, yields the micro-batches that follow.
        backward: False when `step` calls `accelerator.backward` itself.
        coupled: the samples of a forward change each other's loss.
    """

    run: Run
    step: Step
    batches: Callable[[int], Iterable[Any]]
    backward: bool = True
    coupled: bool = False


def batch_plan(config: RunConfig, accelerator: Accelerator, start_step: int) -> BatchPlan:
    """Divide the steps from `start_step` into this process's forwards."""
    return BatchPlan(
        seed=config.seed,
        batch_size=config.per_device_train_batch_size,
        max_steps=config.max_steps,
        start_step=start_step,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
    )


def train_and_compare(
    config: RunConfig,
    *,
    method: str,
    families: Sequence[str],
    set_up: Callable[[ImageAdapter, Accelerator], Job],
    started: float,
) -> RunSummary:
    """Sample the base, train, save, sample again, compare, and write the run folder.

    Args:
        config: resolved options.
        method: name of the method for the summary.
        families: model families that the method trains.
        set_up: makes the job from the loaded model, `prepare` included.
        started: `time.monotonic()` of the beginning.

    Raises:
        InputError: anything in the options or the model is unusable.
    """
    output = Path(config.output_dir)
    accelerator = make_accelerator(config, cpu=config.device == "cpu")
    if sharding.requested() and not zero.requested():
        raise InputError(
            "accelerate_config: fsdp2 is for vision-language models; use ddp or deepspeed_zero3"
        )
    judges = judge_rewards(config.evaluation, config.device)
    adapter = load_adapter(config, device=accelerator.device)
    if adapter.family not in families:
        raise InputError(
            f"{config.model} is of family {adapter.family}; {method} trains "
            f"{' and '.join(families)}"
        )
    resolved = dump_config(config)
    changes = from_main(lambda: begin_folder(output, resolved))
    before = sample_side(adapter, config.evaluation, config.sampling, "sample base")
    job = set_up(adapter, accelerator)
    curve = _curve(config, job.run, judges, before)

    def after_step(step: int) -> None:
        job.run.reference.update(step)
        curve.on_step(step)

    def batches(start: int) -> Iterable[Any]:
        curve.catch_up(start)
        return job.batches(start)

    trainer = Trainer(
        config,
        accelerator=accelerator,
        module=adapter.denoiser,
        step=job.step,
        batches=batches,
        state=job.run.state,
        on_step=after_step,
        backward=job.backward,
    )
    trainer.coupled = job.coupled
    curve.interruptible = trainer.stop.interruptible
    if trainer.ema is not None:
        curve.averaged = trainer.averaged_weights
    with closing(curve), job.run.meter.running():
        result = trainer.train()
    adapter.denoiser = unwrapped(adapter.denoiser)
    with curve.final_weights():
        from_main(lambda: _save(config, adapter, output))
        after = sample_side(adapter, config.evaluation, config.sampling, "sample aligned")
        divergence = _divergence(config, job.run)
    evaluation = measure(before, after, config.evaluation, judges, config.sampling.seed)
    if evaluation is not None:
        evaluation = replace(evaluation, after={**evaluation.after, **divergence})
    subject = Subject(
        method=method,
        model=config.model,
        seed=config.seed,
        steps=result.step,
        wall_seconds=time.monotonic() - started,
        device=str(accelerator.device),
        config=resolved,
        warnings=[*changes, *result.warnings, *curve.notes(result.step)],
        cost=job.run.meter.cost(),
        lora=config.lora.enabled,
    )
    return from_main(lambda: _report(output, subject, evaluation))


def _report(output: Path, subject: Subject, evaluation: Evaluation | None) -> RunSummary:
    summary = write_results(output, subject, evaluation)
    if evaluation is not None:
        tqdm.write(results_table(evaluation))
    tqdm.write(f"report: {output / 'report.html'}")
    return summary


def prepare(config: RunConfig, adapter: ImageAdapter, accelerator: Accelerator) -> Run:
    """Attach what is trained and its reference, then hand the denoiser to accelerate.

    Raises:
        InputError: options are unusable.
    """
    denoiser: Any = adapter.denoiser
    if config.lora.enabled:
        attach_lora(denoiser, config.lora, config.seed)
    else:
        denoiser.requires_grad_(True)
    if config.gradient_checkpointing:
        options = sharding.checkpointing()
        denoiser.enable_gradient_checkpointing(partial(checkpoint, **options))
    if config.channels_last:
        denoiser.to(memory_format=torch.channels_last)
    if sharding.requested():
        sharding.shard_layers([denoiser], accelerator.device)
    reference = make_reference(adapter, config.lora, config)
    adapter.denoiser = prepare_model(accelerator, denoiser)
    meter = CostMeter()
    meter.watch(denoiser)
    with reference.active():  # after full fine-tuning's deep copy, a network of its own
        meter.watch(unwrapped(adapter.denoiser))
    state: dict[str, Stateful] = {"meter": meter}
    if config.reference_update != "never":
        state["reference"] = reference
    return Run(
        adapter=adapter,
        reference=reference,
        accelerator=accelerator,
        meter=meter,
        state=state,
        options=_options_hash(config),
    )


def _options_hash(config: RunConfig) -> str:
    """Hash all options but those that may change in a continued run."""
    kept = {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE}
    return hashlib.sha256(repr(sorted(kept.items())).encode()).hexdigest()


def begin_folder(output: Path, resolved: str) -> list[str]:
    """Write the configuration; say which options a continued run does not have from its beginning.

    Raises:
        InputError: the folder cannot be written.
    """
    clear_leftovers(output)
    changes = _changed_since(output, resolved)
    write_bytes(output / "config.yaml", resolved.encode())
    return changes


def _changed_since(output: Path, resolved: str) -> list[str]:
    file = output / "config.yaml"
    if not (file.exists() and list_checkpoints(output / "checkpoints")):
        return []
    changes = [
        change
        for change in changed_options(file.read_text(encoding="utf-8"), resolved)
        if change.partition(":")[0].partition(".")[0] not in MAY_CHANGE
    ]
    if not changes:
        return []
    note = f"continues with other options than it began with: {'; '.join(changes)}"
    logger.warning("%s %s", output, note)
    return [note]


def _curve(config: RunConfig, run: Run, judges: Judges, before: Tensor | None) -> Curve:
    """Make what evaluates along training; early stopping belongs in the checkpoint."""
    curve = Curve(
        config,
        adapter=run.adapter,
        judges=judges,
        meter=run.meter,
        writes=run.accelerator.is_main_process,
    )
    curve.track = partial(track_evaluation, run.accelerator)
    curve.begin(before, run.trainable)
    if curve.stopping is not None:
        run.state["early_stopping"] = curve.stopping
    return curve


def _divergence(config: RunConfig, run: Run) -> dict[str, float]:
    """Measure `kl`, the divergence from the base; nothing where there are no evaluation prompts."""
    base = base_of(config, run.adapter, run.reference)
    if config.evaluation.prompts is None or base is None:
        return {}
    prompts = evaluation_prompts(config.evaluation)
    return {"kl": kl_to_base(run.adapter, base, prompts, config.sampling, run.accelerator.autocast)}


def _save(config: RunConfig, adapter: Any, output: Path) -> None:
    """Write the adapter, or the whole model after full fine-tuning."""
    if config.lora.enabled:
        save_lora(adapter.denoiser, output / "adapter")
    else:
        complete = adapter.complete_pipeline(adapter.denoiser)
        with no_file_bars():
            complete.save_pretrained(output / "model", safe_serialization=True)
