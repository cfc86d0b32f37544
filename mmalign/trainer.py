"""The training loop, on accelerate. It knows `step(batch) -> StepOutput` and nothing else.

A run is a function of its configuration: global random state is re-seeded from (seed, step) before
every step, the learning rate is a function of the step, and all else that changes is in the
checkpoint. So a run killed at any moment and resumed gives the same weights and `metrics.jsonl`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm import tqdm

from mmalign.accelerator import GRACE_SECONDS, StopSignal, make_accelerator, tracking
from mmalign.accumulation import Measured, accumulate
from mmalign.config import TrainConfig
from mmalign.metrics_log import MetricsLog
from mmalign.monitor import Monitor
from mmalign.optimizer import make_optimizer, skip_update, update
from mmalign.processes import gather
from mmalign.randomness import derive_seed
from mmalign.sharding import unwrapped
from mmalign.training_state import Stateful, TrainingState
from mmalign.types import InputError, StepOutput

MAX_SKIPPED_IN_A_ROW = 25
MAX_IDLE_IN_A_ROW = 50  # generous, because rewards may be sparse
__all__ = ["Stateful", "TrainResult", "Trainer", "make_accelerator"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """What a finished run hands back.

    Attributes:
        step: optimizer steps done, including those before a resume.
        resumed_from: step of the checkpoint this process started from, 0 for a fresh run.
        metrics: the last step's metrics; empty when there was nothing left to do.
        warnings: what the monitor noticed.
        skipped_steps: steps without an update because of `on_nan: skip`.
        idle_steps: steps without an update because there was nothing to learn.
        checkpoint: the last checkpoint.
    """

    step: int
    resumed_from: int
    metrics: Mapping[str, float]
    warnings: list[str]
    skipped_steps: int
    idle_steps: int
    checkpoint: Path | None


class Trainer:
    """Runs optimizer steps, logs them, and keeps checkpoints in `<output_dir>/checkpoints`.

    Only trainable parameters are optimized and saved. Of several processes each has its own
    `batches`, and `step` runs the module that `accelerator.prepare_model` returned. After SIGTERM
    or Ctrl-C the run is saved and exits with code 143 or 130: at the end of the step, or of the one
    before when the step takes longer than the grace.

    Attributes:
        ema: the exponential average, if there is one.
        coupled: set it where the samples of a forward change each other's loss.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        accelerator: Accelerator,
        module: nn.Module,
        step: Callable[[Any], StepOutput],
        batches: Callable[[int], Iterable[Any]],
        state: Mapping[str, Stateful] | None = None,
        on_step: Callable[[int], object] | None = None,
        backward: bool = True,
    ) -> None:
        """Prepare the optimizer; no file is touched before `train`.

        Args:
            config: options of the run.
            accelerator: made by `make_accelerator`.
            module: the network being trained.
            step: loss and metrics of one micro-batch.
            batches: given the number of optimizer steps done, yields the micro-batches that follow,
                `gradient_accumulation_steps` per step.
            state: further objects to save and restore, by name; only caches change within a step.
                One with a true `finished` ends training after the step that made it so.
            on_step: called with the step number after every update and before a checkpoint.
            backward: False when `step` calls `accelerator.backward` itself.

        Raises:
            ValueError: the module has no trainable parameter, or is not the prepared one.
        """
        if accelerator.prepare_model(module) is not module:
            raise ValueError("pass the module that accelerator.prepare_model returned")
        named = unwrapped(module).named_parameters()
        parameters = {name: value for name, value in named if value.requires_grad}
        if not parameters:
            raise ValueError("the module has no trainable parameter")
        self._config, self._accelerator, self._module = config, accelerator, module
        self._step, self._batches, self._backward = step, batches, backward
        self._on_step = on_step
        self._parameters = list(parameters.values())
        self._monitor, self.coupled = Monitor(), False
        # Several processes can only leave together, between two steps.
        self.stop = StopSignal(GRACE_SECONDS if accelerator.num_processes == 1 else None)
        self._log: MetricsLog | None = None
        optimizer, self._lr_factor = make_optimizer(self._parameters, config)
        self._optimizer = accelerator.prepare_optimizer(optimizer)
        decay = config.ema_decay
        self.ema = None if decay is None else EMAModel(self._parameters, decay=decay)
        self._state = TrainingState(
            config,
            accelerator=accelerator,
            parameters=parameters,
            optimizer=self._optimizer,
            ema=self.ema,
            parts={"monitor": self._monitor, **(state or {})},
        )

    def train(self) -> TrainResult:
        """Train up to `max_steps`, resuming first when the configuration says so.

        Raises:
            InputError: a checkpoint cannot be used or written, the output folder holds another run,
                a loss or gradient is not finite under `on_nan: stop`, a reward fails, or there is
                nothing to learn. The weights of the last good step are saved.
            SystemExit: code 143 after SIGTERM, 130 after Ctrl-C.
        """
        config = self._config
        self._state.coupled = self.coupled
        start = step = self._state.resume()
        metrics: dict[str, float] = {}
        main = self._accelerator.is_main_process
        with ExitStack() as stack:
            stack.enter_context(self.stop.installed())
            if main:
                path = Path(config.output_dir) / "metrics.jsonl"
                self._log = stack.enter_context(MetricsLog(path, keep_until=start))
            stack.enter_context(tracking(self._accelerator, config))
            bar = stack.enter_context(
                tqdm(total=config.max_steps, initial=start, desc="train", disable=not main)
            )
            batches = iter(self._batches(start))
            while step < config.max_steps and not self._state.finished:
                step += 1
                metrics = self._train_step(step, batches)
                bar.set_postfix(loss=f"{metrics['loss']:.4g}", refresh=False)
                bar.update()
                self._report(step, metrics)
                if self._on_step is not None:
                    with self._kept_at(step):
                        self._on_step(step)
                self._stop_if_idle(step)
                self._save_or_stop(step)
        self._stop_if_idle(max(start, config.max_steps))
        return TrainResult(
            step=step,
            resumed_from=start,
            metrics=metrics,
            warnings=self._monitor.warnings,
            skipped_steps=self._monitor.skipped,
            idle_steps=self._monitor.idle_steps,
            checkpoint=self._state.last_path,
        )

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Put the exponential average, which must be on, into the module for the block."""
        if self.ema is None:
            raise ValueError("there is no average: ema_decay is not set")
        self.ema.store(self._parameters)
        self.ema.copy_to(self._parameters)
        try:
            yield
        finally:
            self.ema.restore(self._parameters)

    def _train_step(self, step: int, batches: Iterator[Any]) -> dict[str, float]:
        # Libraries draw dropout and the like from global state; this keys those draws as well.
        torch.manual_seed(derive_seed(self._config.seed, step, self._accelerator.process_index))
        if not self._module.training:
            self._module.train()
        try:
            with self._kept_at(step - 1), self.stop.interruptible():
                measured = accumulate(
                    self._step,
                    batches,
                    config=self._config,
                    accelerator=self._accelerator,
                    module=self._module,
                    backward=self._backward,
                )
        except InputError as error:
            # Of several processes the others are in the middle of the step, so nothing is saved.
            several = self._accelerator.num_processes > 1
            kept = self._state.kept if several else self._keep(step - 1)
            raise InputError(f"{error}; {kept}") from error
        lr = self._config.learning_rate * self._lr_factor(step - 1)
        metrics = {**measured.values, "grad_norm": measured.grad_norm, "lr": lr}
        if measured.idle is not None:
            skip_update(self._accelerator)
            self._monitor.idle(step, measured.idle)
            metrics["skipped"] = 1.0
        elif measured.finite or self._overflowed(measured):
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            update(self._optimizer, step, self._state.kept)
            self._monitor.update(step, metrics)
            if self.ema is not None and not self._optimizer.step_was_skipped:
                self.ema.step(self._parameters)
        else:
            self._refuse(step, measured)
            metrics["skipped"] = 1.0
        self._optimizer.zero_grad()
        return metrics

    def _overflowed(self, measured: Measured) -> bool:
        """Tell an fp16 gradient that overflowed, which the scaler handles, from a broken one."""
        scaler, loss = self._accelerator.scaler, measured.values["loss"]
        return scaler is not None and math.isfinite(loss) and scaler.get_scale() > 1

    def _refuse(self, step: int, measured: Measured) -> None:
        """Apply `on_nan`; the weights stay those of the step before."""
        skip_update(self._accelerator)
        loss, norm = measured.values["loss"], measured.grad_norm
        what = f"step {step}: loss {loss:g}, gradient norm {norm:g}"
        if bad_ids := [name for names in gather(measured.bad_ids) for name in names]:
            what += f", in pairs {', '.join(bad_ids[:8])}"
        skip = self._config.on_nan == "skip"
        if skip and self._monitor.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
            self._monitor.skip()
            logger.warning("%s; skipped, %d so far", what, self._monitor.skipped)
            return
        kept = self._keep(step - 1)
        hint = f"{MAX_SKIPPED_IN_A_ROW} before it skipped" if skip else "or set on_nan: skip"
        raise InputError(f"{what}; lower learning_rate or beta ({hint}); {kept}")

    def _stop_if_idle(self, step: int) -> None:
        """End a run that has nothing left to learn from, or never had."""
        monitor = self._monitor
        row, total = monitor.idle_in_a_row, monitor.idle_steps
        if row < MAX_IDLE_IN_A_ROW and total < self._config.max_steps:
            return
        monitor.idle_in_a_row = 0  # a resumed run has another chance
        what = f"step {step}: {row or 'all'} steps in a row taught nothing"
        raise InputError(f"{what}: {monitor.idle_reason}; {self._keep(step)}")

    def _keep(self, step: int) -> str:
        """Save the weights after `step` unless they are saved or lost, and say where they are."""
        if step > self._state.last_step and self._state.finite:
            self._save(step)
        return self._state.kept

    @contextmanager
    def _kept_at(self, step: int) -> Iterator[None]:
        """Save the weights after `step` when the block is told to end in its middle."""
        try:
            yield
        except SystemExit:
            if self._accelerator.num_processes == 1:
                logger.warning("stopped early; %s", self._keep(step))
            raise

    def _save_or_stop(self, step: int) -> None:
        config, stop = self._config, self.stop.agreed(self._accelerator)
        due = config.save_steps > 0 and step % config.save_steps == 0
        if due or stop or step == config.max_steps or self._state.finished:
            self._save(step)
        if stop:
            path = self._state.last_path
            logger.warning("saved %s; --resume_from_checkpoint latest goes on from there", path)
            raise SystemExit(self.stop.exit_code)

    def _save(self, step: int) -> None:
        if self._log is not None:
            self._log.sync()
        self._state.save(step)

    def _report(self, step: int, metrics: Mapping[str, float]) -> None:
        if step % self._config.logging_steps and step != self._config.max_steps:
            return
        if self._log is not None:
            self._log.write(step, metrics)
        self._accelerator.log({k: v for k, v in metrics.items() if math.isfinite(v)}, step=step)
