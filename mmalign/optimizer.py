"""AdamW with its learning rate schedule, as the options of a training run say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler

from mmalign.types import InputError

if TYPE_CHECKING:
    from mmalign.config import TrainConfig


def make_optimizer(
    parameters: Sequence[torch.nn.Parameter], config: TrainConfig
) -> tuple[torch.optim.Optimizer, Callable[[int], float]]:
    """Make the optimizer, and what gives the share of the peak learning rate at a step from 0."""
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
    scheduler = get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.max_steps,
    )
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return optimizer, factor


def update(optimizer: torch.optim.Optimizer, step: int, kept: str) -> None:
    """Change the weights; `kept` says in an error where those of before are.

    Raises:
        InputError: the learning rate is a number that only fits into a Python float.
    """
    try:
        optimizer.step()
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        hint = f"lower learning_rate; {kept}"
        raise InputError(f"step {step}: the update overflows; {hint}") from error


def skip_update(accelerator: Accelerator) -> None:
    """Leave the weights as they are; fp16's scaler has to hear of it."""
    if accelerator.scaler is not None:
        accelerator.scaler.update()
