"""`python -m fault_cases.rank ARGV`: `mmalign ARGV` on one of several processes, with a fault.

The environment's FAULT says what happens on rank 1 in its fourth step, or in a save of rank 0.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fault_cases.rewards import HERE, SLEEP

torch.set_num_threads(1)


def inject(fault: str) -> None:
    """Replace the accumulation of gradients by one that goes wrong in its fourth call."""
    from mmalign import trainer

    original, calls = trainer.accumulate, [0]

    def broken(step: Any, batches: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] != 4:
            return original(step, batches, **options)
        if fault == "nan":

            def spoilt(batch: Any) -> Any:
                output = step(batch)
                return output._replace(loss=output.loss * float("nan"))

            return original(spoilt, batches, **options)
        happen(fault)

    trainer.accumulate = broken


def rest_in_save() -> None:
    """Sleep in the middle of writing the second checkpoint, while there is a file `sleep`.

    The file may say for how many seconds.
    """
    from mmalign import checkpoint

    original, calls = checkpoint._seal, [0]

    def slow(path: Path) -> dict[str, int | str]:
        calls[0] += 1
        if calls[0] == 5 and SLEEP.exists():
            HERE.touch()
            time.sleep(float(SLEEP.read_text() or 1))
        return original(path)

    checkpoint._seal = slow


def happen(fault: str) -> None:
    """Raise, die, leave or hang."""
    if fault == "raise":
        raise RuntimeError("rank 1 fails")
    if fault == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "exit":
        os._exit(0)
    time.sleep(600)


if __name__ == "__main__":
    from mmalign.cli import main

    fault, rank = os.environ.get("FAULT"), os.environ.get("RANK")
    if fault == "save" and rank == "0":
        rest_in_save()
    elif fault and fault != "save" and rank == "1":
        inject(fault)
    sys.exit(main(sys.argv[1:]))
