"""A small regression that is trained like any model, whole or in a fork."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from mmalign.accelerator import make_accelerator
from mmalign.config import TrainConfig
from mmalign.randomness import keyed_generator
from mmalign.trainer import Trainer
from mmalign.types import StepOutput


class Batch(NamedTuple):
    pair_ids: tuple[str, ...]
    inputs: Tensor


class RunningMean:
    """State that moves with training, as a reference or a normalizer does."""

    def __init__(self) -> None:
        self.value = torch.zeros(3)
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.count = state["value"], state["count"]


def make_config(folder: Path, **options: Any) -> TrainConfig:
    config = TrainConfig(
        output_dir=str(folder),
        seed=3,
        max_steps=12,
        gradient_accumulation_steps=2,
        learning_rate=0.05,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        ema_decay=0.9,
        save_steps=4,
        resume_from_checkpoint="latest",
    )
    return dataclasses.replace(config, **options)


class Toy:
    """A regression with dropout, whose data are a function of the step alone."""

    def __init__(self, config: TrainConfig, **options: Any) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.manual_seed(0)
        self.config = config
        self.module = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 3))
        self.module[2].bias.requires_grad_(False)
        self.mean = RunningMean()
        self.seen: list[tuple[str, ...]] = []
        self.trainer = Trainer(
            config,
            accelerator=make_accelerator(config, cpu=True),
            module=self.module,
            step=options.pop("step", self.step),
            batches=self.batches,
            state={"mean": self.mean},
            **options,
        )

    def batches(self, start: int) -> Iterator[Batch]:
        size = self.config.gradient_accumulation_steps
        number = start * size
        while True:
            generator = keyed_generator(self.config.seed, number, "inputs")
            yield Batch((f"pair-{number}",), torch.randn(4, 3, generator=generator))
            number += 1

    def step(self, batch: Batch) -> StepOutput:
        self.seen.append(batch.pair_ids)
        target = batch.inputs.flip(1)
        loss = (self.module(batch.inputs) - target + self.mean.value).square().mean()
        self.mean.value = 0.9 * self.mean.value + 0.1 * batch.inputs.mean(0)
        self.mean.count += 1
        return StepOutput(loss, {"inputs": batch.inputs.mean(), "constant": 2.5})


def in_child(action: Callable[[], object]) -> int:
    """Run `action` in a fork; returns its exit code, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        code = 0
        try:
            torch.set_num_threads(1)
            action()
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            code = 99
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Spoiled(Toy):
    """Losses of the given steps are not a number."""

    bad: frozenset[int] = frozenset()

    def step(self, batch: Batch) -> StepOutput:
        output = super().step(batch)
        number = int(batch.pair_ids[0].removeprefix("pair-"))
        if number % 2 == 1 and number // 2 + 1 in self.bad:
            return StepOutput(output.loss * math.nan, output.metrics)
        return output
