"""Two processes train a vision-language model as one does at the same global batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shared_jobs import JOBS, World, check_same, runs_here

NAMES = [name for name in JOBS if name.startswith("vlm")]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_what_one_trains(name: str, world: World, two: Path) -> None:
    if not runs_here(name):
        pytest.skip("deepspeed is not installed")
    check_same(name, world, two)


def test_a_trial_of_two_is_that_of_one(world: World, two: Path) -> None:
    one, both = (
        json.loads((output / "summary.json").read_text())
        for output in (world.folder / "one" / "vlm-dpo", two / "vlm-dpo")
    )
    assert one["before"] == pytest.approx(both["before"], rel=0, abs=1e-6)
    assert one["after"] == pytest.approx(both["after"], rel=0, abs=1e-5)
    changes = [abs(one["after"][f"yes_{i}"] - one["before"][f"yes_{i}"]) for i in range(5)]
    assert min(changes) > 1e-4
    assert len(set(one["before"].values())) > 5
