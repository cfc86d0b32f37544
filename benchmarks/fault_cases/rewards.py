"""Rewards that fail, by their dotted path `fault_cases.rewards:NAME`.

What they do is decided by files in the working directory, so that a resumed run is another run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CALLS = [0]
SLEEP = Path("sleep")
HERE = Path("here")


def _bright(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


def bright(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Say how bright images are, and never fail."""
    return _bright(images)


def slow(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Sleep in the fourth call, while there is a file `sleep`, which may say for how long."""
    CALLS[0] += 1
    if CALLS[0] >= 4 and SLEEP.exists():
        HERE.touch()
        time.sleep(float(SLEEP.read_text() or 120))
    return _bright(images)


def late(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Say after three calls that time is up."""
    return _fail(images, TimeoutError("no picture within 3 s"))


def raises(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Raise after three calls."""
    return _fail(images, RuntimeError("out of film"))


def short(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return too few scores after three calls."""
    return _bright(images) if _early() else _bright(images)[1:]


def nan(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return NaN after three calls."""
    return _bright(images) if _early() else _bright(images) * float("nan")


def infinite(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return infinity after three calls."""
    return _bright(images) if _early() else _bright(images) / 0


def none(images: Tensor, prompts: Sequence[str]) -> Any:
    """Return nothing after three calls."""
    return _bright(images) if _early() else None


def memory(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Have no memory for more than one image at a time."""
    if len(images) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return _bright(images)


def no_memory(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Have no memory at all after three calls."""
    return _fail(images, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))


def nan_gradient(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return a finite score whose gradient is not."""
    return (images * 0).mean((1, 2, 3)).sqrt()


def _early() -> bool:
    CALLS[0] += 1
    return CALLS[0] <= 3


def _fail(images: Tensor, error: Exception) -> Tensor:
    if not _early():
        raise error
    return _bright(images)
