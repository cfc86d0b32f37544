"""Training from existing pairs, from the model folder to the run folder.

A method's pipeline gives two things: which timesteps it draws, and a function that makes its step.
Everything else (pairs, caches, adapter, reference, trainer, evaluation, report) is wired here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from mmalign.accelerator import make_accelerator
from mmalign.adapters import load_adapter
from mmalign.config import OfflineConfig, dump_config
from mmalign.data.batch import PairBatch, PairCollator, StepDataset
from mmalign.data.cache import CachedPairs, LivePairs, precompute
from mmalign.data.curriculum import CurriculumSampler, curriculum_stages
from mmalign.data.files import write_bytes
from mmalign.data.order import BatchPlan, StepSampler
from mmalign.data.readers import PairTable, read_pairs
from mmalign.lora import attach_lora, save_lora
from mmalign.pipelines._evaluation import (
    Subject,
    judge_rewards,
    measure,
    results_table,
    sample_side,
    write_results,
)
from mmalign.reference import Reference, make_reference
from mmalign.report import RunSummary
from mmalign.trainer import Trainer
from mmalign.training_state import Stateful
from mmalign.types import ImageAdapter, InputError, StepOutput

logger = logging.getLogger(__name__)

Step = Callable[[PairBatch], StepOutput]
Pairs = CachedPairs | LivePairs


@dataclass(frozen=True, kw_only=True)
class OfflineRun:
    """What a method's step works with.

    `state` holds what belongs in the checkpoint besides the weights; a step may add to it.
    """

    adapter: ImageAdapter
    reference: Reference
    accelerator: Accelerator
    state: dict[str, Stateful]

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters being trained."""
        return [p for p in self.adapter.denoiser.parameters() if p.requires_grad]


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What a method draws per pair besides noise.

    Attributes:
        timesteps: scheduler timesteps to choose from, all equally likely.
        guidance_range: interval of the guidance scale, for consistency models.
    """

    timesteps: Sequence[int]
    guidance_range: tuple[float, float] = (1.0, 1.0)


def train_offline(
    config: OfflineConfig,
    *,
    method: str,
    families: Sequence[str],
    draws: Callable[[ImageAdapter], Draws],
    make_step: Callable[[OfflineRun], Step],
    started: float | None = None,
) -> RunSummary:
    """Train on pairs, save the adapter, evaluate, and write the run folder.

    Args:
        config: resolved options.
        method: name of the method for the summary.
        families: model families that the method trains.
        draws: says what is drawn per pair, given the model.
        make_step: makes the step from the run.
        started: `time.monotonic()` of the beginning of the job, if that was before this call.

    Raises:
        InputError: anything in the options, the pairs or the model is unusable.
    """
    started = time.monotonic() if started is None else started
    if config.num_draws and config.reference_update != "never":
        raise InputError("num_draws: cached reference errors need reference_update: never")
    output = Path(config.output_dir)
    table = read_pairs(config.pairs)
    _announce(table)
    judges = judge_rewards(config.evaluation, config.device)
    accelerator = make_accelerator(config, cpu=config.device == "cpu")
    adapter = load_adapter(config, device=accelerator.device)
    if adapter.family not in families:
        raise InputError(
            f"{config.model} is of family {adapter.family}; {method} trains "
            f"{' and '.join(families)}"
        )
    resolved = dump_config(config)
    write_bytes(output / "config.yaml", resolved.encode())
    before = sample_side(adapter, config.evaluation, config.sampling, "sample base")
    pairs = _encode(config, table, adapter, output)
    run = prepare(config, adapter, accelerator)
    feed = _Feed(config, pairs, draws(adapter), accelerator)
    trainer = Trainer(
        config,
        accelerator=accelerator,
        module=adapter.denoiser,
        step=feed.staged(make_step(run)),
        batches=feed.batches,
        state=run.state,
        on_step=run.reference.update,
    )
    result = trainer.train()
    adapter.denoiser = accelerator.unwrap_model(adapter.denoiser)
    with trainer.averaged_weights() if trainer.ema is not None else nullcontext():
        _save(config, adapter, output)
        after = sample_side(adapter, config.evaluation, config.sampling, "sample aligned")
    evaluation = measure(before, after, config.evaluation, judges, config.sampling.seed)
    subject = Subject(
        method=method,
        model=config.model,
        seed=config.seed,
        steps=result.step,
        wall_seconds=time.monotonic() - started,
        device=str(accelerator.device),
        config=resolved,
        warnings=result.warnings,
        lora=config.lora.enabled,
    )
    summary = write_results(output, subject, evaluation)
    if evaluation is not None:
        tqdm.write(results_table(evaluation))
    tqdm.write(f"report: {output / 'report.html'}")
    return summary


def _announce(table: PairTable) -> None:
    logger.info(
        "%d pairs, %d ties dropped, %d bad rows skipped",
        len(table.pairs),
        table.ties,
        len(table.bad_rows),
    )
    if not len(table.pairs):
        raise InputError("no usable pairs are left to train on")


def _encode(config: OfflineConfig, table: PairTable, adapter: Any, output: Path) -> Pairs:
    if not config.pairs.cache_latents:
        return LivePairs(table.pairs, adapter, config.pairs)
    folder = Path(config.pairs.cache_dir) if config.pairs.cache_dir else output / "cache"
    cached = precompute(table.pairs, adapter, config.pairs, folder)
    adapter.release_encoders()
    return cached


def prepare(config: OfflineConfig, adapter: ImageAdapter, accelerator: Accelerator) -> OfflineRun:
    """Attach what is trained and its reference, then hand the denoiser to accelerate."""
    denoiser: Any = adapter.denoiser
    if config.lora.enabled:
        attach_lora(denoiser, config.lora, config.seed)
    else:
        denoiser.requires_grad_(True)
    if config.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    if config.channels_last:
        denoiser.to(memory_format=torch.channels_last)
    reference = make_reference(adapter, config.lora, config)
    adapter.denoiser = accelerator.prepare_model(denoiser)
    state: dict[str, Stateful] = {}
    if config.reference_update != "never":
        state["reference"] = reference
    return OfflineRun(adapter=adapter, reference=reference, accelerator=accelerator, state=state)


class _Feed:
    """The batches of a run, and the curriculum stage of the batch handed out last."""

    def __init__(
        self, config: OfflineConfig, pairs: Pairs, draws: Draws, accelerator: Accelerator
    ) -> None:
        self._config, self._pairs, self._accelerator = config, pairs, accelerator
        self._stages: list[list[int]] | None = None
        if config.curriculum is not None:
            self._stages = curriculum_stages(pairs.prompts, pairs.scores, config.curriculum)
        self._collate = PairCollator(
            seed=config.seed,
            caption_dropout=config.caption_dropout,
            num_draws=config.num_draws,
            empty_condition=pairs.empty_condition,
            timesteps=draws.timesteps,
            guidance_range=draws.guidance_range,
        )
        self.stage = 0

    def batches(self, start_step: int) -> Iterator[PairBatch]:
        """Yield the micro-batches that follow `start_step` optimizer steps."""
        sampler = self._sampler(start_step)
        loader = DataLoader(
            StepDataset(self._pairs),
            batch_sampler=sampler,
            collate_fn=self._collate,
            num_workers=self._config.num_workers,
        )
        for number, batch in enumerate(loader):
            if isinstance(sampler, CurriculumSampler):
                step = start_step + number // self._config.gradient_accumulation_steps
                self.stage = sampler.stage(step)
            yield batch.to(self._accelerator.device)

    def staged(self, step: Step) -> Step:
        """Add the curriculum stage to a step's metrics."""
        if self._stages is None:
            return step

        def with_stage(batch: PairBatch) -> StepOutput:
            output = step(batch)
            return output._replace(metrics={**output.metrics, "stage": float(self.stage)})

        return with_stage

    def _sampler(self, start_step: int) -> StepSampler:
        config = self._config
        plan = BatchPlan(
            seed=config.seed,
            batch_size=config.per_device_train_batch_size,
            max_steps=config.max_steps,
            start_step=start_step,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            num_processes=self._accelerator.num_processes,
            process_index=self._accelerator.process_index,
        )
        if self._stages is None or config.curriculum is None:
            return StepSampler(len(self._pairs), plan)
        return CurriculumSampler(self._stages, config.curriculum.stage_steps, plan)


def _save(config: OfflineConfig, adapter: Any, output: Path) -> None:
    """Write the adapter, or the whole model after full fine-tuning."""
    if config.lora.enabled:
        save_lora(adapter.denoiser, output / "adapter")
    else:
        complete = adapter.complete_pipeline(adapter.denoiser)
        complete.save_pretrained(output / "model", safe_serialization=True)
