"""Evaluation while training runs, and an end to training when it no longer helps.

A reward that keeps rising while an independent measure falls is being exploited rather than
followed. `evaluations.jsonl` has both along training; early stopping acts on one that no training
sees.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.config import EvalConfig, RunConfig
from mmalign.evaluation import measure_images, plan, sample_images
from mmalign.metrics_log import MetricsLog, read_metrics
from mmalign.pipelines._evaluation import Judges, evaluation_prompts
from mmalign.pipelines._meter import COUNTS, CostMeter
from mmalign.processes import from_main
from mmalign.types import ImageAdapter, InputError

FILE = "evaluations.jsonl"
logger = logging.getLogger(__name__)


class EarlyStopping:
    """Remembers the best weights by a metric, and when it last rose; kept in the checkpoint.

    The untrained model takes part: where no evaluation beats it, its weights are the best.
    """

    def __init__(
        self, config: EvalConfig, parameters: Sequence[nn.Parameter], measured: str = ""
    ) -> None:
        """Watch `early_stopping_metric`; `measured` names what else moves its values."""
        self.metric = str(config.early_stopping_metric)
        self._patience, self._parameters = config.early_stopping_patience, parameters
        self._best, self._best_step, self._waited = -float("inf"), 0, 0
        self._weights: list[Tensor] = []
        self._measured = f"{self.metric} {measured}"

    @property
    def finished(self) -> bool:
        """Whether `early_stopping_patience` evaluations in a row brought no new best value."""
        return self._waited >= self._patience

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in the evaluation of the weights as they are now."""
        value = metrics[self.metric]
        if value > self._best:
            self._best, self._best_step, self._waited = value, step, 0
            self._weights = [p.detach().to("cpu", copy=True) for p in self._parameters]
            return
        self._waited += 1
        if self.finished:
            logger.info("early stopping at step %d: %s no longer rises", step, self.metric)

    def note(self, step: int) -> list[str]:
        """Say that the weights are not those of the last step, if they are not."""
        if self._best_step == step:
            return []
        return [
            f"early stopping put back the weights of step {self._best_step}: {self.metric} was"
            f" {self._best:.4g} there and never higher up to step {step}"
        ]

    @torch.no_grad()
    def restore_best(self) -> None:
        """Put the best weights into the parameters."""
        for parameter, best in zip(self._parameters, self._weights, strict=True):
            parameter.copy_(best)

    def state_dict(self) -> dict[str, Any]:
        """Return best value, count and weights, for a checkpoint."""
        return {
            "measured": self._measured,
            "best": self._best,
            "best_step": self._best_step,
            "waited": self._waited,
            "weights": self._weights,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, or from the base if its values were measured otherwise."""
        if state.get("measured") != self._measured:
            logger.warning("evaluation changed: early stopping starts anew from the base")
            return
        self._best, self._best_step = state["best"], state["best_step"]
        self._waited = state["waited"]
        self._weights = [weight.cpu() for weight in state["weights"]]


class Curve:
    """Evaluates the policy every `every_steps` steps on the first `curve_prompts` prompts.

    Rows of `evaluations.jsonl` are `step`, what `measure_images` measures, and what training has
    cost so far; step 0 is the base. Nothing here moves training: its random draws are keyed by the
    step.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        adapter: ImageAdapter,
        judges: Judges,
        meter: CostMeter,
        writes: bool = True,
    ) -> None:
        """Evaluate `adapter`'s policy; of several processes only the main one `writes`."""
        evaluation = config.evaluation
        prompts = [] if evaluation.prompts is None else evaluation_prompts(evaluation)
        self._config, self._adapter, self._judges, self._meter = config, adapter, judges, meter
        self._every = evaluation.every_steps if prompts else 0
        self._prompts, self._seeds = plan(
            prompts[: evaluation.curve_prompts],
            evaluation.images_per_prompt,
            config.sampling.seed,
        )
        self._path = Path(config.output_dir) / FILE
        self._log: MetricsLog | None = None
        self._writes = writes
        self._first: dict[str, float] = {}
        self.averaged: Callable[[], AbstractContextManager[None]] = nullcontext
        self.track: Callable[[int, Mapping[str, float], Tensor], None] | None = None
        self.interruptible: Callable[[], AbstractContextManager[None]] = nullcontext
        self.stopping: EarlyStopping | None = None

    def begin(self, base_images: Tensor | None, parameters: Sequence[nn.Parameter]) -> None:
        """Measure the base, whose images were sampled in the order of the evaluation's plan.

        Raises:
            InputError: `early_stopping_metric` is not measured, or is the judge's.
        """
        if not self._every or base_images is None:
            return
        self._first = self._measured(base_images[: len(self._prompts)])
        metric = self._config.evaluation.early_stopping_metric
        if metric is None:
            return
        # Rewards come first, one name each; what follows is the judge's, then diversity.
        allowed = [*list(self._first)[: len(self._judges.rewards)], "diversity"]
        if metric not in allowed or metric not in self._first:
            raise InputError(
                f"evaluation.early_stopping_metric: {metric} is not a reward of the evaluation;"
                f" there are {', '.join(name for name in allowed if name in self._first)}"
            )
        self.stopping = EarlyStopping(self._config.evaluation, parameters, self._identity())
        self.stopping.update(0, self._first)

    def _identity(self) -> str:
        """Hash what values depend on besides the weights."""
        options = asdict(self._config.evaluation)
        for name in ("every_steps", "early_stopping_patience"):
            del options[name]
        parts = [options, self._prompts, list(self._seeds), asdict(self._config.sampling)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def on_step(self, step: int) -> None:
        """Evaluate after an optimizer step, if it is time."""
        if not self._every:
            return
        self._open(step - 1)
        if step % self._every == 0:
            self._evaluate(step)

    def catch_up(self, step: int) -> None:
        """Evaluate a resumed run's first weights, if it was stopped before that had been done."""
        if not self._every or step == 0 or step % self._every:
            return
        rows = read_metrics(self._path)
        if not any(row["step"] == step for row in rows):
            self._open(step)
            self._evaluate(step)

    def _evaluate(self, step: int) -> None:
        with self._meter.paused(), self.averaged():
            with self.interruptible():
                images = sample_images(
                    self._adapter,
                    self._prompts,
                    self._seeds,
                    self._config.sampling,
                    f"evaluate step {step}",
                )
                metrics = self._measured(images)
            if self.stopping is not None:
                self.stopping.update(step, metrics)
            if self.track is not None:
                self.track(step, metrics, images)
        counts = self._meter.counts()
        if self._log is not None:
            self._log.write(step, {**metrics, **counts})
            self._log.sync()

    def final_weights(self) -> AbstractContextManager[None]:
        """Make the policy what the run hands over: the best weights, or their average, or as is."""
        if self.stopping is None:
            return self.averaged()
        self.stopping.restore_best()
        return nullcontext()

    def notes(self, step: int) -> list[str]:
        """Say what the report should say about early stopping; `step` is the last one done."""
        return [] if self.stopping is None else self.stopping.note(step)

    def close(self) -> None:
        """Close the file."""
        if self._log is not None:
            self._log.close()

    def _open(self, done: int) -> None:
        """Open the file in the first step of this process, whose evaluation it may already have."""
        if self._log is not None or not self._writes:
            return
        self._log = MetricsLog(self._path, keep_until=done)
        if done == 0:
            self._log.write(0, {**self._first, **dict.fromkeys(COUNTS, 0)})

    def _measured(self, images: Tensor) -> dict[str, float]:
        """Measure images; the main process's numbers count, so that all stop at the same step."""
        measured = measure_images(
            images, self._prompts, rewards=self._judges.rewards, judge=self._judges.judge
        )
        return from_main(lambda: measured)
