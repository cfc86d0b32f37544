from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, NamedTuple, cast

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import mmalign.checkpoint
import mmalign.trainer
from mmalign.accelerator import leave_signals, make_accelerator
from mmalign.config import TrainConfig
from mmalign.metrics_log import read_metrics
from mmalign.monitor import WINDOW
from mmalign.randomness import keyed_generator
from mmalign.trainer import MAX_IDLE_IN_A_ROW, MAX_SKIPPED_IN_A_ROW, Trainer, TrainResult
from mmalign.types import InputError, StepOutput


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


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


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


def outcome(folder: Path) -> dict[str, bytes]:
    """Every byte that has to be equal: log, weights, optimizer, average, further state."""
    last = folder / "checkpoints" / "checkpoint-12"
    names = ["model.safetensors", "training.safetensors", "state.json"]
    return {
        "metrics": (folder / "metrics.jsonl").read_bytes(),
        **{name: (last / name).read_bytes() for name in names},
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert in_child(lambda: Toy(make_config(folder)).trainer.train()) == 0
    return outcome(folder)


def kill_at_line(number: int) -> list[int]:
    """Kill this process at the `number`-th line executed in mmalign; returns the running count."""
    count = [0]

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        if "/mmalign/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            count[0] += 1
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    return count


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> int:
    folder = tmp_path_factory.mktemp("lines")

    def count() -> None:
        toy = Toy(make_config(folder))
        counter = kill_at_line(-1)
        toy.trainer.train()
        sys.settrace(None)
        (folder / "count").write_text(str(counter[0]))

    assert in_child(count) == 0
    return int((folder / "count").read_text())


@pytest.mark.parametrize("draw", range(8))
def test_killed_anywhere_and_resumed_is_bitwise_equal(
    tmp_path: Path, uninterrupted: dict[str, bytes], lines: int, draw: int
) -> None:
    """SIGKILL at random lines, several times in one run."""
    points = random.Random(draw)

    def attempt() -> None:
        toy = Toy(make_config(tmp_path))
        kill_at_line(points.randrange(1, lines))
        toy.trainer.train()

    kills = 0
    for _ in range(3):
        kills += in_child(attempt) == -signal.SIGKILL
        points.random()
    assert kills > 0
    assert in_child(lambda: Toy(make_config(tmp_path)).trainer.train()) == 0
    assert outcome(tmp_path) == uninterrupted


def test_killed_by_the_clock_and_resumed_is_bitwise_equal(
    tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    points = random.Random(0)
    for _ in range(6):
        child = os.fork()
        if child == 0:
            Toy(make_config(tmp_path)).trainer.train()
            os._exit(0)
        time.sleep(points.uniform(0.0, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert in_child(lambda: Toy(make_config(tmp_path)).trainer.train()) == 0
    assert outcome(tmp_path) == uninterrupted


@pytest.mark.parametrize("moment", ["save_file", "_seal", "_move_into_place", "_rotate", "_sync"])
def test_killed_inside_a_save_and_resumed_is_bitwise_equal(
    tmp_path: Path, uninterrupted: dict[str, bytes], moment: str
) -> None:
    def attempt() -> None:
        original, calls = getattr(mmalign.checkpoint, moment), [0]

        def die(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if len(list((tmp_path / "checkpoints").glob("checkpoint-*"))) >= 1 and calls[0] > 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(mmalign.checkpoint, moment, die)
        Toy(make_config(tmp_path)).trainer.train()

    assert in_child(attempt) == -signal.SIGKILL
    assert in_child(lambda: Toy(make_config(tmp_path)).trainer.train()) == 0
    assert outcome(tmp_path) == uninterrupted


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_and_exits(
    number: int, code: int, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    def attempt() -> None:
        def terminate(step: int) -> None:
            if step == 6:
                os.kill(os.getpid(), number)

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
        Toy(make_config(tmp_path), on_step=terminate).trainer.train()

    assert in_child(attempt) == code
    assert (tmp_path / "checkpoints" / "checkpoint-6").is_dir()
    assert in_child(lambda: Toy(make_config(tmp_path)).trainer.train()) == 0
    assert outcome(tmp_path) == uninterrupted


@pytest.mark.parametrize("blocked_in", ["step", "evaluation"])
def test_signal_ends_what_takes_longer_than_the_grace(
    blocked_in: str, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    """A reward that waits for ever: the steps before it are saved, or the one it evaluates."""

    def attempt() -> None:
        mmalign.trainer.GRACE_SECONDS = 0.1  # type: ignore[misc]
        toy: Toy | None = None

        def hang() -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

        def step(batch: Batch) -> StepOutput:
            assert toy is not None
            if blocked_in == "step" and len(toy.seen) == 11:  # the second half of step 6
                hang()
            return toy.step(batch)

        def evaluate(number: int) -> None:
            assert toy is not None
            if blocked_in == "evaluation" and number == 6:
                with toy.trainer.stop.interruptible():
                    hang()

        toy = Toy(make_config(tmp_path), step=step, on_step=evaluate)
        toy.trainer.train()

    started = time.monotonic()
    assert in_child(attempt) == 143
    assert time.monotonic() - started < 30
    saved = 5 if blocked_in == "step" else 6
    assert (tmp_path / "checkpoints" / f"checkpoint-{saved}").is_dir()
    if blocked_in == "evaluation":  # this toy's state changes inside a step, as ours never does
        assert in_child(lambda: Toy(make_config(tmp_path)).trainer.train()) == 0
        assert outcome(tmp_path) == uninterrupted


def test_exit_inside_a_step_keeps_the_steps_before(tmp_path: Path) -> None:
    """A reward that waits for people ends the process itself."""

    def attempt() -> None:
        toy: Toy | None = None

        def step(batch: Batch) -> StepOutput:
            assert toy is not None
            if len(toy.seen) == 11:
                raise SystemExit(143)
            return toy.step(batch)

        toy = Toy(make_config(tmp_path), step=step)
        toy.trainer.train()

    assert in_child(attempt) == 143
    assert (tmp_path / "checkpoints" / "checkpoint-5").is_dir()


def test_second_interrupt_is_at_once(tmp_path: Path) -> None:
    def interrupt(step: int) -> None:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            Toy(make_config(tmp_path), on_step=interrupt).trainer.train()
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_handler_is_restored(number: int, tmp_path: Path) -> None:
    before = signal.signal(number, lambda number, frame: None)
    mine = signal.getsignal(number)
    during: list[object] = []
    toy = Toy(
        make_config(tmp_path, max_steps=1),
        on_step=lambda step: during.append(signal.getsignal(number)),
    )
    try:
        toy.trainer.train()
        assert during[0] != mine
        assert signal.getsignal(number) == mine
    finally:
        signal.signal(number, before)


def test_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    during: list[object] = []
    toy = Toy(
        make_config(tmp_path, max_steps=1),
        on_step=lambda step: during.append(signal.getsignal(signal.SIGINT)),
    )
    try:
        toy.trainer.train()
    finally:
        signal.signal(signal.SIGINT, before)
    assert during == [signal.SIG_IGN]


def test_resume_does_not_repeat_or_skip_data(tmp_path: Path) -> None:
    first = Toy(make_config(tmp_path, max_steps=4))
    first.trainer.train()
    second = Toy(make_config(tmp_path, max_steps=8))
    result = second.trainer.train()
    assert [*first.seen, *second.seen] == [(f"pair-{i}",) for i in range(16)]
    assert (result.resumed_from, result.step) == (4, 8)
    assert second.mean.count == 16


def test_a_finished_run_resumes_to_its_weights_and_keeps_its_log(tmp_path: Path) -> None:
    first = Toy(make_config(tmp_path))
    first.trainer.train()
    log = (tmp_path / "metrics.jsonl").read_bytes()
    second = Toy(make_config(tmp_path))
    result = second.trainer.train()
    assert result.step == 12
    assert second.seen == []
    assert torch.equal(second.module[0].weight, first.module[0].weight)
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


def test_a_run_that_is_past_its_end_is_refused(tmp_path: Path) -> None:
    Toy(make_config(tmp_path, max_steps=4)).trainer.train()
    with pytest.raises(InputError, match="has 4 steps already, more than max_steps: 3"):
        Toy(make_config(tmp_path, max_steps=3)).trainer.train()


def test_update_equals_plain_torch(tmp_path: Path) -> None:
    """One accumulated, clipped AdamW step equals the same step written out."""
    config = make_config(
        tmp_path, max_steps=1, warmup_steps=0, ema_decay=None, max_grad_norm=0.1, weight_decay=0.1
    )
    toy, plain = Toy(config), Toy(config)
    for each in (toy, plain):
        each.module[1].p = 0.0
    result = toy.trainer.train()
    optimizer = torch.optim.AdamW(
        [p for p in plain.module.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1
    )
    batches = plain.batches(0)
    losses = []
    for _ in range(2):
        loss = plain.step(next(batches)).loss
        (loss / 2).backward()
        losses.append(loss.item())
    norm = torch.nn.utils.clip_grad_norm_(plain.module.parameters(), 0.1)
    optimizer.step()
    for ours, theirs in zip(toy.module.parameters(), plain.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert result.metrics["loss"] == pytest.approx(sum(losses) / 2)
    assert result.metrics["grad_norm"] == pytest.approx(norm.item())
    assert norm > 0.1


def test_log_lines(tmp_path: Path) -> None:
    toy = Toy(make_config(tmp_path, max_steps=5, logging_steps=2))
    toy.trainer.train()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert list(rows[0]) == ["step", "loss", "inputs", "constant", "grad_norm", "lr"]
    assert rows[0]["constant"] == 2.5
    assert rows[0]["lr"] == pytest.approx(0.05 * 1 / 2)  # second of two warm-up steps
    batches = toy.batches(1)
    inputs = [next(batches).inputs.mean() for _ in range(2)]
    assert rows[0]["inputs"] == pytest.approx(torch.stack(inputs).mean().item())


def test_only_trainable_tensors_are_saved_and_trained(tmp_path: Path) -> None:
    toy = Toy(make_config(tmp_path, max_steps=4))
    frozen = toy.module[2].bias.clone()
    toy.trainer.train()
    saved = mmalign.checkpoint.load_checkpoint(tmp_path / "checkpoints" / "checkpoint-4")
    assert sorted(saved.tensors["model"]) == ["0.bias", "0.weight", "2.weight"]
    assert torch.equal(toy.module[2].bias, frozen)


def test_average_is_applied_and_taken_back(tmp_path: Path) -> None:
    toy = Toy(make_config(tmp_path))
    toy.trainer.train()
    weight = toy.module[0].weight.clone()
    with toy.trainer.averaged_weights():
        assert not torch.equal(toy.module[0].weight, weight)
        assert toy.trainer.ema is not None
        assert torch.equal(toy.module[0].weight, toy.trainer.ema.shadow_params[0])
    assert torch.equal(toy.module[0].weight, weight)


class Spoiled(Toy):
    """Losses of the given steps are not a number."""

    bad: frozenset[int] = frozenset()

    def step(self, batch: Batch) -> StepOutput:
        output = super().step(batch)
        number = int(batch.pair_ids[0].removeprefix("pair-"))
        if number % 2 == 1 and number // 2 + 1 in self.bad:
            return StepOutput(output.loss * math.nan, output.metrics)
        return output


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


def test_loading_processes_outlive_the_first_signals() -> None:
    """Those that a cluster's manager sends to every process of a job."""
    loader = DataLoader(
        cast("Dataset[int]", range(64)), batch_size=1, num_workers=1, worker_init_fn=leave_signals
    )
    batches = iter(loader)
    next(batches)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(worker.pid or 0, number)
    assert len(list(batches)) == 63


def test_loading_processes_do_not_outlive_the_run() -> None:
    def load() -> None:
        leave_signals(0)
        time.sleep(60)

    worker = multiprocessing.get_context("fork").Process(target=load)
    worker.start()
    for _ in range(200):
        worker.terminate()
        worker.join(0.05)
    assert worker.exitcode == -signal.SIGTERM


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


def test_a_fresh_run_does_not_mix_with_an_old_one(tmp_path: Path) -> None:
    Toy(make_config(tmp_path, max_steps=4)).trainer.train()
    log = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="checkpoints of an earlier run"):
        Toy(make_config(tmp_path, resume_from_checkpoint=None)).trainer.train()
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "seed was 3, now 4"),
        ({"gradient_accumulation_steps": 1}, r"samples per step \(.*\) was 8, now 4"),
        ({"ema_decay": None}, "ema was True, now False"),
    ],
)
def test_checkpoint_of_another_run_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    Toy(make_config(tmp_path, max_steps=4)).trainer.train()
    with pytest.raises(InputError, match=message):
        Toy(make_config(tmp_path, **change)).trainer.train()


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    Toy(make_config(tmp_path, max_steps=4)).trainer.train()
    config = make_config(tmp_path)
    toy = Toy(config)
    other = nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 3))
    trainer = Trainer(
        config,
        accelerator=make_accelerator(config, cpu=True),
        module=other,
        step=toy.step,
        batches=toy.batches,
        state={"mean": toy.mean},
    )
    with pytest.raises(InputError, match=r"0\.weight was \[8, 3\], now \[9, 3\]"):
        trainer.train()


@pytest.mark.parametrize(
    "forgery",
    [
        lambda state: {"run": state["run"]},
        lambda state: {**state, "training": "text"},
        lambda state: {**state, "training": {"tensor": "nowhere"}},
        lambda state: {**state, "training": {"dict": [["parts", {"dict": []}]]}},
    ],
    ids=["no training", "text", "unknown tensor", "no optimizer"],
)
def test_state_that_no_run_wrote_is_refused(tmp_path: Path, forgery: Any) -> None:
    """Its manifest fits, so it is not damaged: somebody else made it."""
    Toy(make_config(tmp_path, max_steps=4)).trainer.train()
    path = tmp_path / "checkpoints" / "checkpoint-4"
    data = json.dumps(forgery(json.loads((path / "state.json").read_text()))).encode()
    (path / "state.json").write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    digest = hashlib.sha256(data).hexdigest()
    manifest["files"]["state.json"] = {"bytes": len(data), "sha256": digest}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="its contents are not those of a run"):
        Toy(make_config(tmp_path)).trainer.train()


def test_an_older_checkpoint_is_not_continued_under_newer_ones(tmp_path: Path) -> None:
    Toy(make_config(tmp_path, max_steps=8)).trainer.train()
    older = tmp_path / "checkpoints" / "checkpoint-4"
    with pytest.raises(InputError, match="checkpoint-8: is newer"):
        Toy(make_config(tmp_path, resume_from_checkpoint=str(older))).trainer.train()
    elsewhere = tmp_path / "elsewhere"
    result = Toy(make_config(elsewhere, resume_from_checkpoint=str(older))).trainer.train()
    assert (result.resumed_from, result.step) == (4, 12)


def test_changed_learning_rate_takes_effect_on_resume(tmp_path: Path) -> None:
    flat = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0}
    Toy(make_config(tmp_path, max_steps=4, **flat)).trainer.train()
    result = Toy(make_config(tmp_path, max_steps=5, learning_rate=0.5, **flat)).trainer.train()
    assert result.metrics["lr"] == 0.5


def test_step_may_do_its_own_backward(tmp_path: Path) -> None:
    config = make_config(tmp_path / "own", max_steps=3)
    toy = Toy(config, backward=False)
    original = toy.trainer._step

    def step(batch: Batch) -> StepOutput:
        output = original(batch)
        toy.trainer._accelerator.backward(output.loss)
        return StepOutput(output.loss.detach(), output.metrics)

    toy.trainer._step = step
    result = toy.trainer.train()
    other = Toy(make_config(tmp_path / "other", max_steps=3)).trainer.train()
    assert result.metrics == other.metrics


class Recorder(GeneralTracker):
    """A tracker that keeps what it is told."""

    name = "recorder"
    requires_logging_directory = False
    events: ClassVar[list[Any]] = []

    def __init__(self, project: str) -> None:
        super().__init__()

    @property
    def tracker(self) -> list[Any]:
        return self.events

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.events.append(("config", values["seed"], values["report_to"]))

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.events.append((step, sorted(values)))

    def finish(self) -> None:
        self.events.append("finish")


def test_trackers_get_the_same_numbers_as_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    monkeypatch.setattr(Recorder, "events", [])
    Toy(make_config(tmp_path, report_to=["recorder"], max_steps=3, logging_steps=2)).trainer.train()
    names = ["constant", "grad_norm", "inputs", "loss", "lr"]
    assert Recorder.events == [("config", 3, '["recorder"]'), (2, names), (3, names), "finish"]


@pytest.mark.parametrize("name", ["aim", "clearml"])
def test_tracker_that_is_not_installed_is_an_input_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("mmalign.accelerator.get_available_trackers", list)
    with pytest.raises(InputError, match=f"report_to: {name} is not installed"):
        make_accelerator(make_config(tmp_path, report_to=[name]), cpu=True)


def test_unknown_tracker_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tracker 'tensorbord'"):
        make_accelerator(make_config(tmp_path, report_to=["tensorbord"]), cpu=True)


def test_accumulation_of_the_launcher_does_not_override_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Toy(make_config(tmp_path / "a", max_steps=2)).trainer.train()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    assert Toy(make_config(tmp_path / "b", max_steps=2)).trainer.train().metrics == expected.metrics


def test_precision_the_device_lacks_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mixed_precision: fp16 needs a GPU"):
        make_accelerator(make_config(tmp_path, mixed_precision="fp16"), cpu=True)


def test_bf16_trains_with_float32_weights(tmp_path: Path) -> None:
    toy = Toy(make_config(tmp_path, mixed_precision="bf16"))
    result: TrainResult = toy.trainer.train()
    assert toy.module[0].weight.dtype == torch.float32
    assert math.isfinite(result.metrics["loss"])


def with_loss_scaling(config: TrainConfig) -> Toy:
    """A toy under fp16's loss scaling, which CPUs have as well, starting from too high a scale."""
    toy = Toy(config)
    accelerator, optimizer = toy.trainer._accelerator, toy.trainer._optimizer
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    optimizer.__init__(optimizer.optimizer, scaler=accelerator.scaler)
    return toy


def test_fp16_overflow_is_left_to_the_scaler_and_resumes(tmp_path: Path) -> None:
    whole = with_loss_scaling(make_config(tmp_path / "whole", max_steps=30))
    start = whole.module[0].weight.clone()
    seen: dict[int, Tensor] = {}
    whole.trainer._on_step = lambda step: seen.setdefault(step, whole.module[0].weight.clone())
    result = whole.trainer.train()
    assert result.skipped_steps == 0
    assert torch.equal(seen[1], start)  # overflow: no update yet
    assert not torch.equal(seen[30], start)
    config = make_config(tmp_path / "parts", max_steps=30)

    def first() -> None:
        def die(step: int) -> None:
            if step == 17:
                os.kill(os.getpid(), signal.SIGKILL)

        toy = with_loss_scaling(config)
        toy.trainer._on_step = die
        toy.trainer.train()

    assert in_child(first) == -signal.SIGKILL
    second = with_loss_scaling(config)
    assert second.trainer.train().resumed_from == 16
    assert torch.equal(second.module[0].weight, whole.module[0].weight)
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_nothing_to_train_is_an_error(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    toy = Toy(config)
    with pytest.raises(ValueError, match="no trainable parameter"):
        Trainer(
            config,
            accelerator=make_accelerator(config, cpu=True),
            module=nn.Linear(2, 2).requires_grad_(False),
            step=toy.step,
            batches=toy.batches,
        )


def test_warnings_reach_the_result(tmp_path: Path) -> None:
    toy = Toy(make_config(tmp_path, max_steps=WINDOW))
    original = toy.trainer._step
    toy.trainer._step = lambda batch: original(batch)._replace(metrics={"rewards/margin": 99.0})
    assert "saturated" in toy.trainer.train().warnings[0]
