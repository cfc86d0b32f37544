"""Which pairs each step trains on, as a pure function of the step: a resume needs no state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.utils.data import Sampler

from mmalign.randomness import Key, keyed_generator
from mmalign.types import InputError

StepIndex = tuple[int, int]
"""An optimizer step and the index of a pair it uses."""


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How training steps are divided into forwards.

    Attributes:
        seed: base seed of the order.
        batch_size: pairs per forward on each process.
        max_steps: the optimizer step to stop before.
        start_step: the optimizer step to begin with.
        gradient_accumulation_steps: forwards per optimizer step on each process.
        num_processes: processes that train together; each takes other pairs of a step.
        process_index: which of them this is.
    """

    seed: int
    batch_size: int
    max_steps: int
    start_step: int = 0
    gradient_accumulation_steps: int = 1
    num_processes: int = 1
    process_index: int = 0

    @property
    def batches_per_step(self) -> int:
        """Batches of all processes together in one optimizer step."""
        return self.gradient_accumulation_steps * self.num_processes

    def positions(self) -> range:
        """Positions of this process's batches within a step."""
        return range(self.process_index, self.batches_per_step, self.num_processes)

    def __len__(self) -> int:
        """Count the batches of this process from `start_step` to `max_steps`."""
        return max(0, self.max_steps - self.start_step) * self.gradient_accumulation_steps


def batch_indices(step: int, *, size: int, batch_size: int, seed: Key) -> list[int]:
    """List the samples of batch number `step`, counted from 0.

    Batches are consecutive pieces of one sequence: a permutation of all samples keyed by (seed,
    epoch), followed by that of the next epoch. So batches are always full and may straddle epochs,
    and every sample comes exactly once per epoch.

    Args:
        step: number of the batch.
        size: number of samples.
        batch_size: samples per batch.
        seed: key of the permutations.

    Raises:
        InputError: If there is no sample.
    """
    if size < 1:
        raise InputError("there are no pairs to train on")
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [_permutation(size, seed, p // size)[p % size] for p in positions]


class GroupedOrder:
    """Samples in random order, those of a group one after the other.

    Groups come in a fresh permutation per epoch and keep the order of their samples; a batch may
    end within one.
    """

    def __init__(self, groups: Sequence[str], seed: Key) -> None:
        """Name the group of each sample."""
        self._members: dict[str, list[int]] = {}
        for index, group in enumerate(groups):
            self._members.setdefault(group, []).append(index)
        self._size, self._seed = len(groups), seed

    def batch(self, step: int, batch_size: int) -> list[int]:
        """List the samples of batch number `step`, counted from 0; as `batch_indices`."""
        positions = range(step * batch_size, (step + 1) * batch_size)
        orders = {epoch: self._order(epoch) for epoch in {p // self._size for p in positions}}
        return [orders[p // self._size][p % self._size] for p in positions]

    def _order(self, epoch: int) -> list[int]:
        groups = list(self._members.values())
        order = _permutation(len(groups), self._seed, epoch)
        return [index for group in order for index in groups[group]]


class StepSampler(Sampler[list[StepIndex]]):
    """A batch sampler in random order, with a fresh permutation per epoch.

    Yields lists of (optimizer step, index): `gradient_accumulation_steps` lists per optimizer step
    from `start_step` up to `max_steps`.
    """

    def __init__(self, size: int, plan: BatchPlan) -> None:
        """Sample from `size` pairs."""
        self.size = size
        self.plan = plan

    def batch(self, step: int, position: int) -> list[int]:
        """List the pairs of the batch at `position` within optimizer step `step`."""
        number = step * self.plan.batches_per_step + position
        return batch_indices(
            number, size=self.size, batch_size=self.plan.batch_size, seed=self.plan.seed
        )

    def __iter__(self) -> Iterator[list[StepIndex]]:
        """Iterate over the batches of this process."""
        for step in range(self.plan.start_step, self.plan.max_steps):
            for position in self.plan.positions():
                yield [(step, index) for index in self.batch(step, position)]

    def __len__(self) -> int:
        """Count the batches of this process."""
        return len(self.plan)


@lru_cache(maxsize=4)
def _permutation(size: int, seed: Key, epoch: int) -> Sequence[int]:
    generator = keyed_generator(seed, epoch, "order")
    return tuple(torch.randperm(size, generator=generator).tolist())
