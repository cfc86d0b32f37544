"""The small resumable training loop that every Shapes world model is built with."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

SAVE_EVERY = 250


def train(
    name: str,
    module: nn.Module,
    loss_at: Callable[[int], Tensor],
    *,
    steps: int,
    learning_rate: float,
    state_file: Path,
    warmup: int = 100,
    ema_decay: float | None = None,
) -> None:
    """Minimise `loss_at(step)` over `module` with AdamW, warm-up and cosine decay.

    `loss_at` draws its batch from the step number alone, so that a run resumed from `state_file`
    continues as if it had never stopped. With `ema_decay` the averaged weights are left in
    `module`.
    """
    optimizer = torch.optim.AdamW(module.parameters(), learning_rate)
    average = {key: value.clone() for key, value in module.state_dict().items()}
    start = _load(state_file, module, optimizer, average)
    bar = tqdm(range(start, steps), desc=name, initial=start, total=steps, unit="step")
    running = 0.0
    for step in bar:
        rate = learning_rate * min(1.0, (step + 1) / warmup)
        rate *= 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        if ema_decay is not None:
            _update(average, module, min(ema_decay, (step + 1) / (step + 10)))
        running = loss.item() if step == start else 0.98 * running + 0.02 * loss.item()
        bar.set_postfix(loss=f"{running:.4f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            _save(state_file, step + 1, module, optimizer, average)
    if ema_decay is not None:
        module.load_state_dict(average)


def _update(average: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    for key, value in module.state_dict().items():
        if value.is_floating_point():
            average[key].lerp_(value, 1 - decay)


def _save(
    file: Path,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    state = {
        "step": step,
        "module": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average,
    }
    torch.save(state, temporary)
    os.replace(temporary, file)


def _load(
    file: Path, module: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor]
) -> int:
    if not file.exists():
        return 0
    state = torch.load(file, weights_only=True)
    module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    for key, value in state["average"].items():
        average[key].copy_(value)
    return int(state["step"])
