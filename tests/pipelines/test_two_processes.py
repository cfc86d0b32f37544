"""Two processes train an image generator as one does at the same global batch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from shared_jobs import JOBS, World, check_same, lines, run, runs_here, trained

from mmalign.types import InputError

NAMES = [name for name in JOBS if not name.startswith("vlm")]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_what_one_trains(name: str, world: World, two: Path) -> None:
    if not runs_here(name):
        pytest.skip("deepspeed is not installed")
    check_same(name, world, two)


def test_evaluation_and_early_stopping_are_shared(world: World, two: Path) -> None:
    one = world.folder / "one" / "dro"
    files = ["evaluations.jsonl", "metrics.jsonl"]
    rows = [
        [[json.loads(line) for line in (o / f).read_text().splitlines()] for f in files]
        for o in (one, two / "dro")
    ]
    assert [row["step"] for row in rows[0][0]] == [row["step"] for row in rows[1][0]]
    assert len(rows[0][1]) == len(rows[1][1]) == rows[1][0][-1]["step"]
    for a, b in zip(rows[0][0], rows[1][0], strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-6)
    summaries = [json.loads((o / "summary.json").read_text()) for o in (one, two / "dro")]
    for side in ("before", "after"):
        assert summaries[0][side] == pytest.approx(summaries[1][side], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", ["diffusion-dpo", "diffusion-dpo-deepspeed"])
def test_one_process_goes_on_where_two_stopped(name: str, world: World, two: Path) -> None:
    if not runs_here(name):
        pytest.skip("deepspeed is not installed")
    whole, parts = world.folder / f"{name}-whole", world.folder / f"{name}-parts"
    run(name, world, whole, 1, max_steps=4)
    shutil.copytree(two / name, parts)
    more = {"max_steps": 4, "resume_from_checkpoint": "latest"}
    run(name, world, parts, 1, **more)
    for a, b in zip(lines(whole), lines(parts), strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-6)
    expected, found = trained(whole), trained(parts)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-6)


def test_another_division_that_changes_the_result_is_refused(world: World, two: Path) -> None:
    more: dict[str, Any] = {"max_steps": 4, "resume_from_checkpoint": "latest"}
    with pytest.raises(InputError, match=r"samples per step .* was 4, now 2"):
        run("diffusion-dpo", world, two / "diffusion-dpo", 2, **more)
    divided = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    with pytest.raises(InputError, match="samples per forward of all processes was 4, now 2"):
        run("kto", world, two / "kto", 1, **more, **divided)
