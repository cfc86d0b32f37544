"""A run that is killed or told to stop at any moment goes on bit for bit."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from toy_trainer import Batch, Toy, in_child, make_config

import mmalign.checkpoint
import mmalign.trainer
from mmalign.types import StepOutput

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


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
