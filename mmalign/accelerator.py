"""Accelerate's part of a run: the accelerator, its trackers, and a stop all processes agree on."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from mmalign.config import TrainConfig
from mmalign.types import InputError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE_SECONDS = 10.0
"""How long a step or an evaluation may go on after the process was told to stop."""
REMINDER_SECONDS = 0.5


def make_accelerator(config: TrainConfig, *, cpu: bool = False) -> Accelerator:
    """Make the accelerator of a run.

    Args:
        config: options of the run.
        cpu: stay on the CPU even where there is a GPU.

    Raises:
        InputError: a tracker is unknown or not installed, or the device lacks the precision.
    """
    missing = {str(name) for name in LoggerType} - {str(name) for name in get_available_trackers()}
    for name in config.report_to:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise InputError(f"report_to: no tracker {name!r}; there are {known}")
        if name in missing:
            raise InputError(f"report_to: {name} is not installed; install it or leave it out")
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            cpu=cpu,
            log_with=config.report_to or None,
            project_dir=config.output_dir,
        )
    except ValueError as error:
        raise InputError(f"mixed_precision {config.mixed_precision}: {error}") from error
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("mixed_precision: fp16 needs a GPU; use bf16 or no")
    # `accelerate launch` sets a number of its own through the environment.
    accelerator.gradient_accumulation_steps = config.gradient_accumulation_steps
    return accelerator


@contextmanager
def tracking(accelerator: Accelerator, config: TrainConfig) -> Iterator[None]:
    """Start the trackers of `report_to` and finish them at the end of the block."""
    if config.report_to:
        accelerator.init_trackers("mmalign", config=_flat(dataclasses.asdict(config)))
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers.clear()


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a flag for the duration of a `with` block.

    A second Ctrl-C interrupts at once. A signal that the process was started to ignore stays
    ignored. Outside the main thread no signal arrives and the flag stays down.
    """

    def __init__(self, grace: float | None = None) -> None:
        """Start with the flag down; `interruptible` blocks end `grace` seconds after it rises."""
        self.received: signal.Signals | None = None
        self._grace, self._since, self._inside = grace, 0.0, False
        self._over = threading.Event()

    @property
    def requested(self) -> bool:
        """Whether the process was asked to stop."""
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """Exit code of a process that the signal ended, as shells count: 143 or 130."""
        return 128 + (self.received or signal.SIGTERM)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals inside the block; the previous handlers come back afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._request)
        try:
            yield
        finally:
            self._over.set()
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Run a block that may take long and leaves nothing half done when it ends early.

        Raises:
            SystemExit: with the signal's code, when the grace is over; whatever the block does,
                a server's answer it waits for included.
        """
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def agreed(self, accelerator: Accelerator) -> bool:
        """Tell whether any process was asked to stop, so that all leave after the same step."""
        if accelerator.num_processes == 1:
            return self.requested
        flag = torch.tensor(float(self.requested), device=accelerator.device)
        return bool(accelerator.reduce(flag, reduction="sum").item() > 0)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self._since = time.monotonic()
            if self._grace is not None:
                threading.Thread(target=self._remind, args=(self._grace,), daemon=True).start()
        elif number == signal.SIGTERM:
            over = self._grace is not None and time.monotonic() - self._since >= self._grace
            if self._inside and over:
                self._inside = False
                raise SystemExit(self.exit_code)
            return
        if number == signal.SIGINT:
            if self.received == signal.SIGINT:
                raise KeyboardInterrupt
            # A write of its own: stderr's buffer may be in the middle of one.
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")
        self.received = signal.Signals(number)

    def _remind(self, grace: float) -> None:
        """Signal again when the grace is over; nothing else ends what the main thread waits for."""
        wait = grace
        while not self._over.wait(wait):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            wait = REMINDER_SECONDS


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    """Flatten nested options to what every tracker stores."""
    flat: dict[str, int | float | str | bool] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = (
                value if isinstance(value, int | float | str) else json.dumps(value)
            )
    return flat
