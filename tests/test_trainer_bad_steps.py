"""Steps that are not finite, teach nothing or fail: what stops, what is skipped, what is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from toy_trainer import Batch, Spoiled, Toy, make_config

import mmalign.checkpoint
from mmalign.metrics_log import read_metrics
from mmalign.trainer import MAX_IDLE_IN_A_ROW, MAX_SKIPPED_IN_A_ROW
from mmalign.types import InputError, StepOutput

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_nan_stops_with_the_sample_and_the_last_good_weights(tmp_path: Path) -> None:
    toy = Spoiled(make_config(tmp_path))
    toy.bad = frozenset({7})
    with pytest.raises(InputError, match=r"step 7: loss nan.*in pairs pair-13;.*checkpoint-6"):
        toy.trainer.train()
    assert all(p.isfinite().all() for p in toy.module.parameters())
    assert mmalign.checkpoint.latest_checkpoint(tmp_path / "checkpoints") == (
        tmp_path / "checkpoints" / "checkpoint-6"
    )
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_nan_step_is_skipped_counted_and_logged(tmp_path: Path) -> None:
    toy = Spoiled(make_config(tmp_path, on_nan="skip"))
    toy.bad = frozenset({3, 7})
    before: dict[int, Tensor] = {}
    toy.trainer._on_step = lambda step: before.setdefault(step, toy.module[0].weight.clone())
    result = toy.trainer.train()
    assert result.skipped_steps == 2
    assert torch.equal(before[6], before[7])
    assert not torch.equal(before[7], before[8])
    row = read_metrics(tmp_path / "metrics.jsonl")[6]
    assert (row["loss"], row["skipped"]) == (None, 1.0)
    assert all(p.isfinite().all() for p in toy.module.parameters())


def test_infinite_gradient_with_a_finite_loss_counts_as_bad(tmp_path: Path) -> None:
    toy = Toy(make_config(tmp_path))
    original = toy.trainer._step

    def step(batch: Batch) -> StepOutput:
        output = original(batch)
        # d/dx sqrt(x) at 0 is infinite while the loss stays finite.
        loss = output.loss + (toy.module[0].weight * 0).square().sum().sqrt()
        return StepOutput(loss, output.metrics)

    toy.trainer._step = step
    with pytest.raises(InputError, match=r"step 1: loss \d.*gradient norm (nan|inf), in pairs \S"):
        toy.trainer.train()


def test_an_update_that_overflows_is_one_line(tmp_path: Path) -> None:
    toy = Toy(make_config(tmp_path, learning_rate=1e38, warmup_steps=0))
    with pytest.raises(InputError, match=r"step 1: the update overflows; .*those it began with"):
        toy.trainer.train()


@pytest.mark.parametrize("save_steps", [1, 100])
def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, save_steps: int) -> None:
    """They may become so in an update whose gradient was finite."""
    config = make_config(tmp_path, max_steps=5, save_steps=save_steps)
    toy = Toy(config)
    original = toy.trainer._optimizer.step

    def step() -> None:
        original()
        if len(toy.seen) == 3 * config.gradient_accumulation_steps:
            toy.module[0].weight.data[0] = torch.inf

    toy.trainer._optimizer.step = step  # type: ignore[method-assign]
    words = "step 3: weights are no longer" if save_steps == 1 else "step 4: loss (nan|inf)"
    with pytest.raises(InputError, match=words) as caught:
        toy.trainer.train()
    place = "checkpoint-2" if save_steps == 1 else "those it began with"
    assert str(caught.value).endswith(place)


def test_skipping_for_ever_stops(tmp_path: Path) -> None:
    config = make_config(tmp_path, on_nan="skip", max_steps=100)
    toy = Spoiled(config)
    toy.bad = frozenset(range(5, 100))
    with pytest.raises(InputError, match=rf"step {5 + MAX_SKIPPED_IN_A_ROW}: .* before it skipped"):
        toy.trainer.train()


class Idle(Spoiled):
    """The given steps have nothing to learn from; half of step 2 has not."""

    def step(self, batch: Batch) -> StepOutput:
        output = Toy.step(self, batch)
        number = int(batch.pair_ids[0].removeprefix("pair-"))
        if number // 2 + 1 in self.bad or number == 2:
            return StepOutput(output.loss * 0, output.metrics, idle="all tied")
        return output


def test_idle_step_moves_nothing_and_is_counted(tmp_path: Path) -> None:
    toy = Idle(make_config(tmp_path))
    toy.bad = frozenset({6, 7})
    weights: dict[int, Tensor] = {}
    toy.trainer._on_step = lambda step: weights.setdefault(step, toy.module[0].weight.clone())
    result = toy.trainer.train()
    assert torch.equal(weights[5], weights[7])  # neither weight decay nor momentum
    assert not torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[7], weights[8])
    assert (result.idle_steps, result.skipped_steps) == (2, 0)
    assert result.warnings == ["2 of the first 7 steps skipped: all tied"]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if row.get("skipped")] == [6, 7]


def test_idle_steps_are_bitwise_the_same_after_a_resume(tmp_path: Path) -> None:
    logs = []
    for name, stops in (("whole", [12]), ("parts", [6, 12])):
        for stop in stops:
            toy = Idle(make_config(tmp_path / name, max_steps=stop, lr_scheduler_type="linear"))
            toy.bad = frozenset({6, 7})
            toy.trainer._lr_factor = lambda step: 1 / (1 + step)
            warnings = toy.trainer.train().warnings
        logs.append(((tmp_path / name / "metrics.jsonl").read_bytes(), warnings))
    assert logs[0] == logs[1]


def test_run_that_is_always_idle_ends(tmp_path: Path) -> None:
    for folder, steps, last in (("short", 6, 6), ("long", 200, MAX_IDLE_IN_A_ROW + 3)):
        toy = Idle(make_config(tmp_path / folder, max_steps=steps))
        toy.bad = frozenset(range(1, 100)) - ({1, 3} if folder == "long" else set())
        line = rf"step {last}: {min(steps, 50)} steps in a row taught nothing: all tied; .*-{last}$"
        with pytest.raises(InputError, match=line):
            toy.trainer.train()
    toy = Idle(make_config(tmp_path / "short", max_steps=6))
    with pytest.raises(InputError, match="step 6: all steps in a row taught nothing: all tied"):
        toy.trainer.train()


def test_input_error_in_a_step_keeps_the_steps_before(tmp_path: Path) -> None:
    config = make_config(tmp_path / "parts", save_steps=0)
    toy = Toy(config)
    original = toy.trainer._step

    def step(batch: Batch) -> StepOutput:
        if batch.pair_ids[0] == "pair-10":  # the first half of step 6
            raise InputError("the scorer is down")
        return original(batch)

    toy.trainer._step = step
    with pytest.raises(InputError, match=r"^the scorer is down; last good weights: .*-5$"):
        toy.trainer.train()
    Toy(config).trainer.train()
    whole = Toy(make_config(tmp_path / "whole", save_steps=0))
    whole.trainer.train()
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("parts", "whole")]
    assert logs[0] == logs[1]
