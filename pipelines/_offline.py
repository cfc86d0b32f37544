"""Training from existing pairs, from the model folder to the run folder.

A method's pipeline gives two things: which timesteps it draws, and a function that makes its step.
Pairs, their caches and their order are wired here, the rest of the run in `_training`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.utils.data import DataLoader

from mmalign.accelerator import leave_signals
from mmalign.config import OfflineConfig
from mmalign.data.batch import PairBatch, PairCollator, StepDataset
from mmalign.data.cache import CachedPairs, LivePairs, precompute
from mmalign.data.curriculum import CurriculumSampler, curriculum_stages
from mmalign.data.order import StepSampler
from mmalign.data.readers import PairTable, read_pairs
from mmalign.pipelines._training import Job, Run, Step, batch_plan, prepare, train_and_compare
from mmalign.report import RunSummary
from mmalign.types import ImageAdapter, InputError, StepOutput

logger = logging.getLogger(__name__)

Pairs = CachedPairs | LivePairs


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
    make_step: Callable[[Run], Step],
    coupled: bool = False,
    started: float | None = None,
) -> RunSummary:
    """Train on pairs, save the adapter, evaluate, and write the run folder.

    Args:
        config: resolved options.
        method: name of the method for the summary.
        families: model families that the method trains.
        draws: says what is drawn per pair, given the model.
        make_step: makes the step from the run.
        coupled: the samples of a forward change each other's loss.
        started: `time.monotonic()` of the beginning of the job, if that was before this call.

    Raises:
        InputError: anything in the options, the pairs or the model is unusable.
    """
    started = time.monotonic() if started is None else started
    if config.num_draws and config.reference_update != "never":
        raise InputError("num_draws: cached reference errors need reference_update: never")
    table = read_pairs(config.pairs)
    _announce(table)

    def set_up(adapter: ImageAdapter, accelerator: Accelerator) -> Job:
        pairs = _encode(config, table, adapter)
        run = prepare(config, adapter, accelerator)
        feed = _Feed(config, pairs, draws(adapter), accelerator)
        step = feed.staged(make_step(run))
        return Job(run=run, step=step, batches=feed.batches, coupled=coupled)

    return train_and_compare(
        config, method=method, families=families, set_up=set_up, started=started
    )


def _announce(table: PairTable) -> None:
    logger.info(
        "%d pairs, %d ties dropped, %d bad rows skipped",
        len(table.pairs),
        table.ties,
        len(table.bad_rows),
    )
    if not len(table.pairs):
        raise InputError("no usable pairs are left to train on")


def _encode(config: OfflineConfig, table: PairTable, adapter: Any) -> Pairs:
    if not config.pairs.cache_latents:
        return LivePairs(table.pairs, adapter, config.pairs)
    folder = Path(config.pairs.cache_dir or Path(config.output_dir) / "cache")
    cached = precompute(table.pairs, adapter, config.pairs, folder)
    adapter.release_encoders()
    return cached


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
            worker_init_fn=leave_signals,
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
        plan = batch_plan(config, self._accelerator, start_step)
        if self._stages is None or config.curriculum is None:
            return StepSampler(len(self._pairs), plan)
        return CurriculumSampler(self._stages, config.curriculum.stage_steps, plan)
