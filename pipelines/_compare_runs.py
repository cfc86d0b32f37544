"""Processes of a comparison: several at a time, one log each, none stops the others."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from mmalign.data.files import write_bytes
from mmalign.types import InputError

POLL_SECONDS = 0.1
LOG, COMMAND = "run.log", "command.json"


class Task(NamedTuple):
    """One process.

    Attributes:
        label: what it is called in messages.
        arguments: what follows `mmalign`.
        folder: where its log lies.
        finished: says whether an earlier process has done it.
        succeeded: called with its wall seconds after it ended well.
        inputs: what it reads besides its arguments.
    """

    label: str
    arguments: list[str]
    folder: Path
    finished: Callable[[], bool]
    succeeded: Callable[[float], object] = lambda seconds: None
    inputs: Sequence[str] = ()


@dataclass
class _Active:
    task: Task
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)


class Runner:
    """Runs tasks and remembers which failed, by label."""

    def __init__(self, processes: int, bar: tqdm[Any]) -> None:
        """Run `processes` tasks at a time and advance `bar` by one for each that ends."""
        self._processes, self._bar = processes, bar
        self._shown = ""
        self.failed: dict[str, str] = {}

    def run(self, tasks: Sequence[Task]) -> None:
        """Run tasks that are not finished yet; on the way out nothing is left running.

        Raises:
            InputError: a folder holds a run of other options.
        """
        waiting = list(tasks)
        active: list[_Active] = []
        before = signal.signal(signal.SIGTERM, _leave)
        try:
            while waiting or active:
                while waiting and len(active) < self._processes:
                    self._begin(waiting.pop(0), active)
                self._show(active)
                time.sleep(POLL_SECONDS if active else 0)
                for item in [a for a in active if a.process.poll() is not None]:
                    active.remove(item)
                    self._end(item)
        finally:
            for item in active:  # SIGTERM: a training run saves itself and can be resumed
                item.process.terminate()
            for item in active:
                item.process.wait()
            signal.signal(signal.SIGTERM, before)

    def _show(self, active: Sequence[_Active]) -> None:
        """Name what runs; the bar is drawn again only when that changes."""
        text = ", ".join(item.task.label for item in active)[:60] or "done"
        if text != self._shown:
            self._shown = text
            self._bar.set_description(text)

    def _begin(self, task: Task, active: list[_Active]) -> None:
        _claim(task)
        if task.finished():
            self._bar.update()
            return
        with (task.folder / LOG).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "mmalign", *task.arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": str(threads_each(self._processes))},
            )
        active.append(_Active(task, process))

    def _end(self, item: _Active) -> None:
        self._bar.update()
        task, code = item.task, item.process.returncode
        if code == 0:
            task.succeeded(time.monotonic() - item.started)
        if code == 0 and task.finished():
            return
        log = task.folder / LOG
        self.failed[task.label] = str(log)
        tqdm.write(f"{task.label} failed (exit code {code}): {_last_line(log)}; log: {log}")


def _leave(number: int, frame: object) -> None:
    """Turn SIGTERM into an exception: dying at once would leave the runs behind, unwatched."""
    raise SystemExit(128 + number)


def threads_each(processes: int) -> int:
    """Share the threads: of `OMP_NUM_THREADS` where it is set, else of the machine."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    total = int(given) if given.isdigit() else os.cpu_count() or 1
    return max(1, total // processes)


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Read the summary of a run that is complete; None for one that is not."""
    try:
        summary = json.loads((folder / "summary.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) and "cost" in summary else None


def _claim(task: Task) -> None:
    """Write down what is run in a folder, and refuse one in which something else was run."""
    file, identity = task.folder / COMMAND, [*task.arguments, *task.inputs]
    if file.is_file():
        before = json.loads(file.read_text("utf-8"))
        if before != identity:
            other = sorted({*before} ^ {*identity})
            raise InputError(
                f"{task.folder}: holds a run of other options ({', '.join(other[:4])}); choose"
                " another output_dir or remove it"
            )
        return
    write_bytes(file, json.dumps(identity).encode())


def _last_line(log: Path) -> str:
    """Find what the process said last; bars overwrite themselves with carriage returns."""
    lines = re.split(r"[\r\n]+", log.read_bytes()[-4000:].decode("utf-8", "replace"))
    spoken = [line.strip() for line in lines if line.strip()]
    return spoken[-1][:300] if spoken else "no output"
