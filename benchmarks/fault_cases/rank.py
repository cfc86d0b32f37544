"""`python -m fault_cases.rank ARGV`: `mmalign ARGV` on one of several processes, with a fault.

The environment's FAULT says what happens on rank 1 in its fourth step.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch

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

    if os.environ.get("FAULT") and os.environ.get("RANK") == "1":
        inject(os.environ["FAULT"])
    sys.exit(main(sys.argv[1:]))
