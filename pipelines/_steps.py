"""Training steps over pairs: how per-side errors become one loss.

Every offline objective sees the same thing: an error of the policy and one of the reference for
each side of each pair. A `PairMeasure` says what the error is (denoising, consistency); a step
says how the two sides are back-propagated (together, or one after the other with less memory).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mmalign.config import OfflineConfig
from mmalign.data.batch import PairBatch
from mmalign.diffusion import denoising_error, training_target
from mmalign.pipelines._training import Run, Step
from mmalign.processes import gather
from mmalign.sharding import requested
from mmalign.types import ImageAdapter, InputError, StepOutput

logger = logging.getLogger(__name__)
PairLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Mapping[str, Tensor]]]
"""(policy errors (2B,), reference errors (2B,), score margins (B,)) -> (loss (B,), metrics)."""


class Measured(NamedTuple):
    """The reference's errors (2B,) and what the policy is compared with (2B, C, h, w)."""

    ref_error: Tensor
    target: Tensor


class PairMeasure(Protocol):
    """An error per side of each pair."""

    def reference(self, batch: PairBatch) -> Measured:
        """Run the reference, without gradients."""
        ...

    def policy(self, batch: PairBatch, target: Tensor) -> Tensor:
        """Run the policy and return its errors (2B,), with gradients."""
        ...


class DenoisingMeasure:
    """Mean squared denoising error at the batch's timesteps.

    With `cache` the reference's errors are kept by (pair, draw): draws are fixed then, so they
    never change. The cache is part of the checkpoint, because an error computed again in another
    batch may differ in its last bits. Where weights are divided, nothing is looked up: processes
    have to run as many forwards.
    """

    def __init__(self, run: Run, *, cache: bool = False, needs_reference: bool = True) -> None:
        """Measure with `run`'s adapter and reference."""
        self._run, self._needs_reference = run, needs_reference
        self._cache = cache and not requested()
        self._known: dict[str, tuple[float, float]] = {}
        if cache:
            run.state["reference_errors"] = self

    def reference(self, batch: PairBatch) -> Measured:
        """Run the reference, or look its errors up."""
        adapter = self._run.adapter
        target = training_target(
            batch.latents,
            batch.noise,
            batch.timesteps,
            adapter.alphas_cumprod,
            adapter.prediction_type,
        )
        if not self._needs_reference:
            return Measured(torch.zeros(len(target), device=target.device), target)
        keys = [f"{pair}/{draw}" for pair, draw in zip(batch.pair_ids, batch.draws, strict=True)]
        if self._cache and all(key in self._known for key in keys):
            sides = torch.tensor([self._known[key] for key in keys], device=target.device)
            return Measured(sides.T.reshape(-1), target)
        with torch.no_grad(), self._run.reference.active():
            errors = denoising_error(self._predict(batch), target)
        if self._cache:
            chosen, rejected = errors.chunk(2)
            rows = zip(chosen.tolist(), rejected.tolist(), strict=True)
            self._known.update(zip(keys, rows, strict=True))
        return Measured(errors, target)

    def policy(self, batch: PairBatch, target: Tensor) -> Tensor:
        """Run the policy."""
        return denoising_error(self._predict(batch), target)

    def state_dict(self) -> dict[str, Any]:
        """Return the errors that any process has cached."""
        known = {key: errors for found in gather(self._known) for key, errors in found.items()}
        return {
            "options": self._run.options,
            "keys": list(known),
            "errors": torch.tensor(list(known.values()), dtype=torch.float32),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the cached errors, unless they were computed under other options."""
        if state.get("options") != self._run.options:
            logger.warning("options changed: the reference's cached errors are computed again")
            return
        pairs = (tuple(row) for row in state["errors"].tolist())
        self._known = dict(zip(state["keys"], pairs, strict=True))

    def _predict(self, batch: PairBatch) -> Tensor:
        adapter = self._run.adapter
        noisy = adapter.add_noise(batch.latents, batch.noise, batch.timesteps)
        with self._run.accelerator.autocast():
            return adapter.predict(noisy, batch.timesteps, batch.condition).float()


def all_timesteps(adapter: ImageAdapter) -> range:
    """Every timestep of the noise schedule."""
    return range(len(adapter.alphas_cumprod))


def timesteps_between(adapter: ImageAdapter, low: int, high: int | None) -> range:
    """List the timesteps from `low` to `high`, the schedule's last when omitted.

    Raises:
        InputError: there are none.
    """
    last = len(adapter.alphas_cumprod) - 1
    high = last if high is None else high
    if not 0 <= low <= high <= last:
        raise InputError(
            f"min_timestep, max_timestep: need 0 <= min <= max <= {last}, got {low} and {high}"
        )
    return range(low, high + 1)


def make_pair_step(config: OfflineConfig, run: Run, measure: PairMeasure, loss: PairLoss) -> Step:
    """Choose between the joint step and the split one.

    Raises:
        InputError: the options contradict each other.
    """
    if not config.split_pair_backward:
        return _joint_step(measure, loss)
    if config.mixed_precision == "fp16" or run.accelerator.num_processes > 1:
        raise InputError(
            "split_pair_backward: needs one process and no fp16; use bf16 or gradient_checkpointing"
        )
    return _split_step(run, measure, loss)


def _joint_step(measure: PairMeasure, loss: PairLoss) -> Step:
    def step(batch: PairBatch) -> StepOutput:
        known = measure.reference(batch)
        errors = measure.policy(batch, known.target)
        per_pair, metrics = loss(errors, known.ref_error, batch.margins)
        return StepOutput(per_pair.mean(), metrics)

    return step


def _split_step(run: Run, measure: PairMeasure, loss: PairLoss) -> Step:
    """Back-propagate one image at a time, pair by pair.

    A pair's loss depends on the parameters only through its two errors, so its gradient is
    c_chosen * grad(error_chosen) + c_rejected * grad(error_rejected), with c the derivatives of the
    loss. Taking each error's gradient alone keeps one image's activations alive at a time.
    """
    parameters = run.trainable

    def side(batch: PairBatch, target: Tensor, row: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        error = measure.policy(_row(batch, row), target[row : row + 1])
        return error.detach(), torch.autograd.grad(error.sum(), parameters)

    def step(batch: PairBatch) -> StepOutput:
        known = measure.reference(batch)
        count = len(batch.pair_ids)
        totals = [torch.zeros_like(parameter) for parameter in parameters]
        errors = torch.empty_like(known.ref_error)
        for pair in range(count):
            rows = [pair, count + pair]
            sides = [side(batch, known.target, row) for row in rows]
            leaf = torch.cat([error for error, _ in sides]).requires_grad_()
            per_pair, _ = loss(leaf, known.ref_error[rows], batch.margins[pair : pair + 1])
            (weights,) = torch.autograd.grad(per_pair.sum() / count, leaf)
            for total, chosen, rejected in zip(totals, sides[0][1], sides[1][1], strict=True):
                total.add_(weights[0] * chosen + weights[1] * rejected)
            errors[rows] = leaf.detach()
        per_pair, metrics = loss(errors, known.ref_error, batch.margins)
        return StepOutput(_with_gradients(per_pair.mean(), parameters, totals), metrics)

    return step


def _row(batch: PairBatch, row: int) -> PairBatch:
    """Cut one image out of a batch; what belongs to pairs stays as it is."""
    pick = slice(row, row + 1)
    return batch._replace(
        latents=batch.latents[pick],
        noise=batch.noise[pick],
        timesteps=batch.timesteps[pick],
        condition={name: rows[pick] for name, rows in batch.condition.items()},
        empty_condition={name: rows[pick] for name, rows in batch.empty_condition.items()},
        guidance_scale=batch.guidance_scale[pick],
    )


def _with_gradients(
    value: Tensor, parameters: list[nn.Parameter], gradients: list[Tensor]
) -> Tensor:
    """Make a scalar equal to `value` whose backward pass leaves `gradients` on `parameters`."""
    carrier = torch.stack(
        [
            (parameter * gradient).sum()
            for parameter, gradient in zip(parameters, gradients, strict=True)
        ]
    ).sum()
    return carrier - carrier.detach() + value.detach()
