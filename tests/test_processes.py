"""Two processes agree: on results, failures, steps that are skipped, and when to stop."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from two_processes import Ended, in_two

from mmalign import cli, processes
from mmalign.accelerator import make_accelerator, prepare_model
from mmalign.config import TrainConfig
from mmalign.metrics_log import read_metrics
from mmalign.trainer import Trainer
from mmalign.types import InputError, StepOutput


class Batch(NamedTuple):
    pair_ids: tuple[str, ...]
    inputs: Tensor


Change = Callable[[int, Tensor], Tensor]
"""What becomes of a loss at a step of the first process's clock."""


def train(folder: Path, change: Change, **options: Any) -> None:
    """Fit a layer; each process has an input of its own."""
    config = TrainConfig(output_dir=str(folder), max_steps=4, learning_rate=0.1, **options)
    accelerator = make_accelerator(config, cpu=True)
    torch.manual_seed(0)
    module = prepare_model(accelerator, nn.Linear(2, 1))
    clock = [0]

    def step(batch: Batch) -> StepOutput:
        clock[0] += 1
        loss = change(clock[0], module(batch.inputs).square().mean())
        return StepOutput(loss, {"input": batch.inputs.mean()})

    def batches(start: int) -> Iterator[Batch]:
        while True:
            yield Batch((f"pair-{processes.rank()}",), torch.full((1, 2), processes.rank() + 1.0))

    Trainer(config, accelerator=accelerator, module=module, step=step, batches=batches).train()


def started(folder: Path, change: Change, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Ended:
    """Train in two processes as the command line would run it."""
    monkeypatch.setattr(cli, "_dispatch", lambda arguments: train(folder, change, **options) or 0)
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.2)
    return in_two(lambda: cli.main(["train"]), folder, timeout=40)


def said(output: str) -> list[str]:
    """List what is neither empty nor progress nor a warning of torch that there is no network."""
    lines = [
        line for line in re.split(r"[\r\n]+", output) if line and "[c10d] The host" not in line
    ]
    return [line for line in lines if not line.startswith("train:")]


def test_alone_there_is_nothing_to_agree_on() -> None:
    assert (processes.rank(), processes.world_size(), processes.is_main()) == (0, 1, True)
    assert processes.share([1, 2, 3]) == [1, 2, 3]
    assert processes.gather_shared([1, 2]) == [1, 2]
    assert processes.from_main(lambda: 3) == processes.together(lambda: 3) == 3
    assert processes.added_up({"a": 2}) == {"a": 2}
    assert processes.largest(4, "cpu") == 4


def test_results_and_failures_reach_both(tmp_path: Path) -> None:
    def both() -> None:
        make_accelerator(TrainConfig(output_dir=str(tmp_path)), cpu=True)
        rank = processes.rank()
        assert processes.gather(rank) == [0, 1]
        assert processes.share(range(5)) == (range(0, 5, 2), range(1, 5, 2))[rank]
        assert processes.gather_shared(list(processes.share(range(5)))) == [0, 1, 2, 3, 4]
        assert processes.added_up({"a": rank + 1}) == {"a": 3}
        assert float(processes.mean(torch.tensor(float(rank)))) == 0.5
        assert processes.largest(rank + 3, "cpu") == 4
        assert processes.from_main(lambda: processes.rank()) == 0
        for function, process in ((processes.from_main, 0), (processes.together, 1)):
            with pytest.raises(InputError, match=f"bad in {process}"):
                function(lambda process=process: fail(process))

    def fail(process: int) -> None:
        if processes.rank() == process:
            raise InputError(f"bad in {process}")

    ended = in_two(both, tmp_path)
    assert ended.codes == [0, 0], ended.output


def test_a_broken_loss_of_one_is_skipped_by_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(step: int, loss: Tensor) -> Tensor:
        return loss * float("nan") if step == 2 and processes.rank() == 1 else loss

    ended = started(tmp_path, broken, monkeypatch, on_nan="skip")
    assert ended.codes == [0, 0], ended.output
    assert [row.get("skipped") for row in read_metrics(tmp_path / "metrics.jsonl")] == [
        None,
        1.0,
        None,
        None,
    ]
    assert said(ended.output[1]) == []
    ended = started(tmp_path / "stop", broken, monkeypatch)
    assert ended.codes == [2, 2]
    for output in ended.output:  # the launcher would have ended the second before it spoke
        (line,) = said(output)
        assert "in pairs pair-1; lower" in line
    assert (tmp_path / "stop" / "checkpoints" / "checkpoint-1").is_dir()


def test_a_failure_of_one_ends_both_with_a_line_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(step: int, loss: Tensor) -> Tensor:
        if step == 2 and processes.rank() == 1:
            raise InputError("reward x failed")
        return loss

    ended = started(tmp_path, failing, monkeypatch)
    assert ended.codes == [1, 2]
    kept = "last good weights: those it began with"
    assert said(ended.output[1]) == [f"error: reward x failed; {kept}"]
    (line,) = said(ended.output[0])
    assert line.startswith("error: process 0 of 2 lost contact")


def test_who_does_not_answer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hanging(step: int, loss: Tensor) -> Tensor:
        if step == 2 and processes.rank() == 1:
            time.sleep(6)  # the launcher ends it before
        return loss

    ended = started(tmp_path, hanging, monkeypatch, ddp_timeout=2)
    assert all(code > 0 for code in ended.codes)
    (line,) = said(ended.output[0])
    assert line.startswith("error: process 0 of 2 lost contact")


def test_a_signal_to_one_stops_both_after_the_same_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(step: int, loss: Tensor) -> Tensor:
        if step == 2 and processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    ended = started(tmp_path, stopped, monkeypatch, save_steps=0)
    assert ended.codes == [143, 143], ended.output
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-2"]


def test_who_has_lost_its_launcher_is_told_to_stop_and_then_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processes, "LOOK_SECONDS", 0.05)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "0.3")
    heard, tell = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, lambda number, frame: os.write(tell, b"stop"))
            processes.stop_with_launcher()
            time.sleep(0.3)
            os.write(tell, b"start ")
            time.sleep(20)
            os.write(tell, b" end")
            os._exit(0)
        os.close(heard)
        time.sleep(0.8)
        os._exit(0)
    os.close(tell)
    with os.fdopen(heard, "rb") as stream:  # up to the end of all who hold the other side
        assert stream.read() == b"start stop"
    os.waitpid(launcher, 0)


def test_who_was_started_otherwise_looks_after_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    before = threading.active_count()
    processes.stop_with_launcher()
    assert threading.active_count() == before
