"""Trackers, precision, the launcher's settings, and processes that load data."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from torch.utils.data import DataLoader, Dataset
from toy_trainer import Toy, make_config

from mmalign.accelerator import leave_signals, make_accelerator
from mmalign.types import InputError

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


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
