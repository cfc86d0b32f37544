"""Accelerate's part of a run: the accelerator, its trackers, and a stop all processes agree on."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    LoggerType,
    patch_environment,
)
from torch import nn

from mmalign import zero
from mmalign.config import TrainConfig, how_to_install
from mmalign.sharding import REQUESTS, requested
from mmalign.types import InputError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
MAX_TRACKED_IMAGES = 16
TRACKIO_SERVERS = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
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
            raise InputError(f"report_to: {name} is not installed; {how_to_install(name)}")
    if zero.requested():
        zero.check()
    try:
        # Dividing weights is `mmalign.sharding`'s, so accelerate is not told of it.
        with patch_environment(**dict.fromkeys(REQUESTS, "false")):
            accelerator = Accelerator(
                mixed_precision=config.mixed_precision,
                gradient_accumulation_steps=config.gradient_accumulation_steps,
                cpu=cpu,
                log_with=config.report_to or None,
                project_dir=config.output_dir,
                kwargs_handlers=[
                    InitProcessGroupKwargs(timeout=timedelta(seconds=config.ddp_timeout)),
                    # Buffers are constants here, and processes need not run as many forwards each:
                    # evaluation and cached references give them shares of different sizes.
                    DistributedDataParallelKwargs(broadcast_buffers=False),
                ],
            )
    except ValueError as error:
        raise InputError(f"mixed_precision {config.mixed_precision}: {error}") from error
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("mixed_precision: fp16 needs a GPU; use bf16 or no")
    # `accelerate launch` sets a number of its own through the environment.
    accelerator.gradient_accumulation_steps = config.gradient_accumulation_steps
    return accelerator


def prepare_model(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """Hand a network to accelerate, which wraps it where there are several processes.

    One whose weights are divided averages its gradients itself.
    """
    with warnings.catch_warnings():
        # Its successor does not exist in the oldest torch that is supported.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        prepared: nn.Module = accelerator.prepare_model(module, evaluation_mode=requested())
    return prepared


@contextmanager
def tracking(accelerator: Accelerator, config: TrainConfig) -> Iterator[None]:
    """Start the trackers of `report_to` and finish them at the end of the block.

    Raises:
        InputError: one cannot start, because its server does not answer or wants a key, or would
            use the network although the run is `offline`.
    """
    if "trackio" in config.report_to and getattr(config, "offline", False):
        for variable in TRACKIO_SERVERS:
            if os.environ.get(variable):
                raise InputError(f"offline: {variable} is set, which sends metrics to a server")
    if config.report_to:
        try:
            accelerator.init_trackers(
                "mmalign",
                config=_flat(dataclasses.asdict(config)),
                init_kwargs=_tracker_options(config),
            )
        except Exception as error:  # each tracker has errors of its own
            names, reason = ", ".join(config.report_to), " ".join(str(error).split())
            raise InputError(f"report_to: {names} did not start: {reason[:300]}") from error
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers.clear()


def track_evaluation(
    accelerator: Accelerator, step: int, metrics: Mapping[str, float], images: torch.Tensor
) -> None:
    """Send an evaluation to the trackers; pictures go to those that take any.

    Args:
        accelerator: the run's, whose trackers `tracking` has started.
        step: optimizer steps done.
        metrics: value by name; they arrive as `evaluation/NAME`.
        images: (B, 3, H, W) in [0, 1]; the first 16 are sent.
    """
    values = {f"evaluation/{k}": v for k, v in metrics.items() if math.isfinite(v)}
    accelerator.log(values, step=step)
    pixels = images[:MAX_TRACKED_IMAGES].mul(255).round().clamp(0, 255).byte()
    pictures = pixels.permute(0, 2, 3, 1).cpu().numpy()
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"evaluation/images": pictures}, step=step, **layout)


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


def leave_signals(worker: int) -> None:
    """Keep a loading process alive when all of a job's processes are told to stop.

    The main process needs it to the end of its step, and then ends it, if need be by a second
    SIGTERM. By itself such a process dies at the first, and takes the run with it unsaved.

    Args:
        worker: its number, as `worker_init_fn` gets it.
    """

    def first(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, first)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _tracker_options(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """Name the run after its folder, keep files in there, and stay off the network if told to.

    A resumed run goes on under the name, and for wandb the number, that it had.
    """
    folder = Path(config.output_dir)
    wandb, trackio = {"name": folder.name, "dir": config.output_dir}, {"name": folder.name}
    if getattr(config, "offline", False):
        wandb["mode"] = "offline"
    if config.resume_from_checkpoint is not None:
        trackio["resume"] = wandb["resume"] = "allow"
        if earlier := sorted(folder.glob("wandb/*run-*-*"), key=lambda path: path.stat().st_mtime):
            wandb["id"] = earlier[-1].name.rpartition("-")[2]
    return {"wandb": wandb, "trackio": trackio}


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
