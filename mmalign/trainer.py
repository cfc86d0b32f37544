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
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from mmalign.accelerator import SIGTERM_EXIT_CODE, StopSignal, make_accelerator, tracking
from mmalign.config import TrainConfig
from mmalign.metrics_log import MetricsLog
from mmalign.monitor import Monitor
from mmalign.randomness import derive_seed
from mmalign.training_state import Stateful, TrainingState
from mmalign.types import InputError, StepOutput

MAX_SKIPPED_IN_A_ROW = 25
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
        checkpoint: the last checkpoint.
    """

    step: int
    resumed_from: int
    metrics: Mapping[str, float]
    warnings: list[str]
    skipped_steps: int
    checkpoint: Path | None


class _Measured(NamedTuple):
    """One step before its update: mean loss and metrics, gradient norm, ids of bad samples."""

    values: dict[str, float]
    grad_norm: float
    bad_ids: list[str]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.values["loss"]) and math.isfinite(self.grad_norm)


class Trainer:
    """Runs optimizer steps, logs them, and keeps checkpoints in `<output_dir>/checkpoints`.

    Only trainable parameters are optimized and saved. In a distributed run the caller prepares the
    module with `accelerator.prepare_model`, so that `step` runs the wrapped one, and gives each
    process its own `batches`. After SIGTERM the run is saved at the end of the step and exits with
    code 143.
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
            state: further objects whose state is saved and restored, by name; one with a true
                `finished` ends training after the step that made it so.
            on_step: called with the step number after every update and before a checkpoint.
            backward: False when `step` calls `accelerator.backward` itself.

        Raises:
            ValueError: the module has no trainable parameter, or is not the prepared one.
        """
        if accelerator.prepare_model(module) is not module:
            raise ValueError("pass the module that accelerator.prepare_model returned")
        named = accelerator.unwrap_model(module).named_parameters()
        parameters = {name: value for name, value in named if value.requires_grad}
        if not parameters:
            raise ValueError("the module has no trainable parameter")
        self._config, self._accelerator, self._module = config, accelerator, module
        self._step, self._batches, self._backward = step, batches, backward
        self._on_step = on_step
        self._parameters = list(parameters.values())
        self._monitor, self._stop = Monitor(), StopSignal()
        self._log: MetricsLog | None = None
        optimizer = torch.optim.AdamW(
            self._parameters,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        self._lr_factor: Callable[[int], float] = get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.max_steps,
        ).lr_lambdas[0]
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
                or a loss or gradient is not finite under `on_nan: stop`.
            SystemExit: code 143 after SIGTERM.
        """
        config = self._config
        start = step = self._state.resume()
        metrics: dict[str, float] = {}
        main = self._accelerator.is_main_process
        with ExitStack() as stack:
            stack.enter_context(self._stop.installed())
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
                    self._on_step(step)
                self._save_or_stop(step)
        return TrainResult(
            step=step,
            resumed_from=start,
            metrics=metrics,
            warnings=self._monitor.warnings,
            skipped_steps=self._monitor.skipped,
            checkpoint=self._state.last_path,
        )

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Put the exponential average into the module for the duration of the block.

        Raises:
            ValueError: `ema_decay` is not set.
        """
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
        measured = self._accumulate(batches)
        lr = self._config.learning_rate * self._lr_factor(step - 1)
        metrics = {**measured.values, "grad_norm": measured.grad_norm, "lr": lr}
        if measured.finite or self._overflowed(measured):
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            self._monitor.update(step, metrics)
            if self.ema is not None and not self._optimizer.step_was_skipped:
                self.ema.step(self._parameters)
        else:
            self._refuse(step, measured)
            metrics["skipped"] = 1.0
        self._optimizer.zero_grad()
        return metrics

    def _accumulate(self, batches: Iterator[Any]) -> _Measured:
        """Run the micro-batches of one step; its clipped gradients are left in the parameters."""
        accelerator, keys = self._accelerator, ["loss"]
        rows: list[Tensor] = []
        ids: list[tuple[str, ...]] = []
        accelerator.step = 0  # an exception may have left it in the middle of a step
        for _ in range(self._config.gradient_accumulation_steps):
            batch = next(batches, None)
            if batch is None:
                raise RuntimeError("`batches` ended before max_steps")
            with accelerator.accumulate(self._module):
                output = self._step(batch)
                if self._backward:
                    accelerator.backward(output.loss)
            named = {"loss": 0.0, **output.metrics} | {"loss": output.loss}
            keys = keys if rows else list(named)
            rows.append(_row([named[key] for key in keys], accelerator.device))
            ids.append(tuple(getattr(batch, "pair_ids", ())))
        norm = accelerator.clip_grad_norm_(self._parameters, self._config.max_grad_norm or math.inf)
        table = torch.stack(rows)
        finite = table[:, 0].isfinite().tolist()
        means = accelerator.reduce(table, reduction="mean").cpu().double().mean(0).tolist()
        bad_ids = [i for fine, names in zip(finite, ids, strict=True) if not fine for i in names]
        return _Measured(dict(zip(keys, means, strict=True)), float(norm), bad_ids)

    def _overflowed(self, measured: _Measured) -> bool:
        """Tell an fp16 gradient that overflowed, which the scaler handles, from a broken one."""
        scaler, loss = self._accelerator.scaler, measured.values["loss"]
        return scaler is not None and math.isfinite(loss) and scaler.get_scale() > 1

    def _refuse(self, step: int, measured: _Measured) -> None:
        """Apply `on_nan`; the weights stay those of the step before."""
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.update()
        loss, norm = measured.values["loss"], measured.grad_norm
        what = f"step {step}: loss {loss:g}, gradient norm {norm:g}"
        if measured.bad_ids:
            what += f", in pairs {', '.join(measured.bad_ids[:8])}"
        skip = self._config.on_nan == "skip"
        if skip and self._monitor.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
            self._monitor.skip()
            logger.warning("%s; skipped, %d so far", what, self._monitor.skipped)
            return
        if step - 1 > self._state.last_step:
            self._save(step - 1)
        hint = f"{MAX_SKIPPED_IN_A_ROW} before it skipped" if skip else "or set on_nan: skip"
        where = f"last good weights: {self._state.last_path}"
        raise InputError(f"{what}; lower learning_rate or beta ({hint}); {where}")

    def _save_or_stop(self, step: int) -> None:
        config, stop = self._config, self._stop.agreed(self._accelerator)
        due = config.save_steps > 0 and step % config.save_steps == 0
        if due or stop or step == config.max_steps or self._state.finished:
            self._save(step)
        if stop:
            logger.warning("SIGTERM: saved %s, stopping", self._state.last_path)
            raise SystemExit(SIGTERM_EXIT_CODE)

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


def _row(values: list[Tensor | float], device: torch.device) -> Tensor:
    return torch.stack([torch.as_tensor(v).detach().to(device, torch.float32) for v in values])
