"""Forward and backward of one optimizer step, over its micro-batches and processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mmalign.config import TrainConfig
from mmalign.sharding import clip_gradients, requested
from mmalign.types import StepOutput


class Measured(NamedTuple):
    """One step before its update.

    `values` are the means of loss and metrics, and `idle` says why no micro-batch had anything to
    learn from; None when one had. `bad_ids` are the samples of micro-batches whose loss is not
    finite, or all samples of the step when only the gradient is not.
    """

    values: dict[str, float]
    grad_norm: float
    bad_ids: list[str]
    idle: str | None

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are finite."""
        return math.isfinite(self.values["loss"]) and math.isfinite(self.grad_norm)


def accumulate(
    step: Callable[[Any], StepOutput],
    batches: Iterator[Any],
    *,
    config: TrainConfig,
    accelerator: Accelerator,
    module: nn.Module,
    backward: bool,
) -> Measured:
    """Run the micro-batches of one step; its clipped gradients are left in the parameters.

    Args:
        step: loss and metrics of one micro-batch.
        batches: yields micro-batches.
        config: options of the run.
        accelerator: made by `make_accelerator`.
        module: the prepared network.
        backward: False when `step` calls `accelerator.backward` itself.
    """
    keys = ["loss"]
    rows: list[Tensor] = []
    ids: list[tuple[str, ...]] = []
    reasons: list[str | None] = []
    accelerator.step = 0  # an exception may have left it in the middle of a step
    for _ in range(config.gradient_accumulation_steps):
        batch = next(batches, None)
        if batch is None:
            raise RuntimeError("`batches` ended before max_steps")
        with accelerator.accumulate(module):
            output = step(batch)
            if backward:
                accelerator.backward(output.loss)
        named = {"loss": 0.0, **output.metrics} | {"loss": output.loss}
        keys = keys if rows else list(named)
        idle = float(output.idle is not None)
        rows.append(_row([*(named[key] for key in keys), idle], accelerator.device))
        ids.append(tuple(getattr(batch, "pair_ids", ())))
        reasons.append(output.idle)
    parameters = [p for p in module.parameters() if p.requires_grad]
    clip = clip_gradients if requested() else accelerator.clip_grad_norm_
    norm = clip(parameters, config.max_grad_norm or math.inf)
    table = torch.stack(rows)
    finite = table[:, 0].isfinite().tolist()
    reduced = accelerator.reduce(table, reduction="mean").cpu().double().mean(0).tolist()
    *means, idle_share = reduced
    if math.isfinite(means[0]) and not math.isfinite(norm):
        finite = [False] * len(ids)
    bad_ids = [i for fine, names in zip(finite, ids, strict=True) if not fine for i in names]
    return Measured(
        dict(zip(keys, means, strict=True)),
        float(norm),
        bad_ids,
        reasons[-1] if idle_share == 1 else None,
    )


def _row(values: list[Tensor | float], device: torch.device) -> Tensor:
    return torch.stack([torch.as_tensor(v).detach().to(device, torch.float32) for v in values])
