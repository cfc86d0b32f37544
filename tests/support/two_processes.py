"""Runs an action in two processes that train together, or in one, as forks of the test process."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.state import AcceleratorState


class Ended(NamedTuple):
    """Exit codes (minus the signal's number for a killed process) and output, by process."""

    codes: list[int]
    output: list[str]


def in_two(action: Callable[[], object], folder: Path, *, timeout: float = 60) -> Ended:
    """Run `action` in two processes connected by gloo; they are killed at the time-out."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return _run(action, folder, ranks, timeout)


def in_one(action: Callable[[], object], folder: Path, *, timeout: float = 60) -> Ended:
    """Run `action` in a process that may change what it shares with no other test."""
    return _run(action, folder, [{}], timeout)


def _run(
    action: Callable[[], object], folder: Path, environments: list[dict[str, str]], timeout: float
) -> Ended:
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"process-{number}.log" for number in range(len(environments))]
    children = [_fork(action, *each) for each in zip(environments, logs, strict=True)]
    codes = [_reap(child, time.monotonic() + timeout) for child in children]
    return Ended(codes, [log.read_text() for log in logs])


def _fork(action: Callable[[], object], environment: dict[str, str], log: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("wb") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ |= {**environment, "TQDM_DISABLE": "1"}
        torch.set_num_threads(1)
        AcceleratorState._reset_state(reset_partial_state=True)
        result = action()
        code = result if isinstance(result, int) else 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _reap(child: int, deadline: float) -> int:
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
