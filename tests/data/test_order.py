from __future__ import annotations

import itertools
from collections import Counter

import pytest

from mmalign.data.order import BatchPlan, GroupedOrder, StepSampler, batch_indices
from mmalign.types import InputError


def plan(**changes: int) -> BatchPlan:
    return BatchPlan(**{"seed": 3, "batch_size": 4, "max_steps": 12, **changes})


def flat(batches: list[list[tuple[int, int]]]) -> list[int]:
    return [index for batch in batches for _, index in batch]


@pytest.mark.parametrize(("size", "batch_size"), [(10, 4), (3, 8), (1, 1), (12, 4)])
def test_every_sample_comes_once_per_epoch(size: int, batch_size: int) -> None:
    number = 3 * size
    sequence = [
        index
        for step in range(number)
        for index in batch_indices(step, size=size, batch_size=batch_size, seed=0)
    ]
    assert len(sequence) == number * batch_size
    for start in range(0, len(sequence) - size + 1, size):
        assert sorted(sequence[start : start + size]) == list(range(size))


def test_epochs_and_seeds_differ() -> None:
    first, second = (batch_indices(e, size=50, batch_size=50, seed=0) for e in (0, 1))
    other = batch_indices(0, size=50, batch_size=50, seed=1)
    assert first != second
    assert first != other
    assert first != sorted(first)


def test_no_samples_is_refused() -> None:
    with pytest.raises(InputError, match="no pairs"):
        batch_indices(0, size=0, batch_size=1, seed=0)


def test_sampler_yields_step_and_index() -> None:
    batches = list(StepSampler(10, plan(gradient_accumulation_steps=3)))
    assert len(batches) == len(StepSampler(10, plan(gradient_accumulation_steps=3))) == 36
    assert [{step for step, _ in batch} for batch in batches] == [{i // 3} for i in range(36)]
    assert all(len(batch) == 4 for batch in batches)


def test_resume_at_every_step_equals_the_uninterrupted_run() -> None:
    whole = list(StepSampler(10, plan(gradient_accumulation_steps=2)))
    for start in range(13):
        resumed = StepSampler(10, plan(gradient_accumulation_steps=2, start_step=start))
        assert list(resumed) == whole[2 * start :]
        assert len(resumed) == len(whole) - 2 * start


def test_accumulation_splits_the_same_steps() -> None:
    whole = StepSampler(10, plan(batch_size=4))
    split = StepSampler(10, plan(batch_size=1, gradient_accumulation_steps=4))
    assert flat(list(split)) == flat(list(whole))


def test_processes_share_each_step_without_overlap() -> None:
    alone = list(StepSampler(50, plan(batch_size=2, gradient_accumulation_steps=4)))
    shared = [
        list(
            StepSampler(
                50,
                plan(
                    batch_size=2,
                    gradient_accumulation_steps=2,
                    num_processes=2,
                    process_index=process,
                ),
            )
        )
        for process in range(2)
    ]
    assert Counter(flat(alone)) == Counter(flat(shared[0]) + flat(shared[1]))
    step_zero = [index for run in shared for batch in run[:2] for _, index in batch]
    assert sorted(step_zero) == sorted(flat(alone[:4]))
    assert len(set(step_zero)) == 8


def test_grouped_order_keeps_groups_together_and_every_sample_once() -> None:
    groups = ["a", "b", "a", "c", "b", "a"]
    order = GroupedOrder(groups, seed=3)
    for epoch in range(3):
        found = [i for step in range(3) for i in order.batch(3 * epoch + step, 2)]
        assert sorted(found) == list(range(6))
        runs = [groups[i] for i in found]
        assert sum(a != b for a, b in itertools.pairwise(runs)) == 2
    firsts = {tuple(order.batch(epoch, 6)) for epoch in range(8)}
    assert len(firsts) > 1
    assert order.batch(1, 4) == [*order.batch(0, 6)[4:], *order.batch(1, 6)[:2]]
