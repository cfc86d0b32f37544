"""What the processes of one run share, and how they agree.

A run is started as one process, or as several by `accelerate launch` or torchrun. Every function
here works in both cases, and with several all of them have to call it. Only what the run's own
processes send each other is unpickled.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

from mmalign.types import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
GRACE_SECONDS = 2.0
"""How long a process waits for another one to report the failure that it has met as well."""
LOOK_SECONDS = 1.0
"""How often a process looks whether its launcher is still there."""


def world_size() -> int:
    """Count the processes that have found each other, 1 before they have."""
    if "torch" not in sys.modules:
        return 1
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process."""
    if world_size() == 1:
        return 0
    import torch.distributed as dist

    return dist.get_rank()


def is_main() -> bool:
    """Tell whether this is the process that writes files and talks to the user."""
    return rank() == 0


def launched() -> tuple[int, int]:
    """Return the number of this process and their count as the launcher gave them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def share(items: Sequence[T]) -> Sequence[T]:
    """Take every n-th item for this process of n."""
    return items[rank() :: world_size()]


def gather(value: T) -> list[T]:
    """Collect a value of every process, by number."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    found: list[T | None] = [None] * world_size()
    dist.all_gather_object(found, value)
    return cast("list[T]", found)


def gather_shared(parts: Sequence[T]) -> list[T]:
    """Put what each process made of its `share` back into the order of the whole."""
    everything = gather(list(parts))
    total = sum(len(found) for found in everything)
    return [everything[i % len(everything)][i // len(everything)] for i in range(total)]


def added_up(counts: Mapping[str, float]) -> dict[str, float]:
    """Sum counts by name over all processes."""
    everyone = gather(dict(counts))
    return {name: sum(found[name] for found in everyone) for name in counts}


def mean(value: Tensor) -> Tensor:
    """Average a tensor without gradient over all processes."""
    if world_size() == 1:
        return value
    import torch.distributed as dist

    total = value.detach().clone()
    dist.all_reduce(total)
    return total / world_size()


def largest(value: int, device: torch.device | str) -> int:
    """Return the largest of all processes' numbers."""
    if world_size() == 1:
        return value
    import torch
    import torch.distributed as dist

    found = torch.tensor(value, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def leave() -> None:
    """Close the connections at the end of a run."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.destroy_process_group()


def stop_with_launcher() -> None:
    """From now on, end this process soon after its launcher, torchrun or ours, was killed.

    Nobody else would end it: it would go on, and hold its device. It saves itself as after SIGTERM,
    and is killed after as long as the launcher would have waited.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()
    patience = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30"))

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(patience)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def lost_contact(error: RuntimeError) -> str | None:
    """Say in one line that another process is gone or does not answer, if `error` means that."""
    number, count = launched()
    if count == 1:
        return None
    import torch.distributed as dist

    text = str(error).splitlines()[0] if str(error) else ""
    if not isinstance(error, dist.DistError) and "gloo" not in text.lower():
        return None
    return (
        f"process {number} of {count} lost contact with the others, one of which failed or did not"
        f" answer within ddp_timeout: {text}"
    )


def report(message: str) -> None:
    """Write a failure to stderr, unless another process of the run has just done so.

    The launcher ends all processes once one has failed, so the main one reports at once and the
    others only if they outlive that.
    """
    number, count = launched()
    if count > 1 and number:
        time.sleep(GRACE_SECONDS + 0.5 * min(number, 16))
    sys.stderr.write(message)
    sys.stderr.flush()


class _Outcome(NamedTuple):
    value: object
    problem: str | None


def from_main(work: Callable[[], T]) -> T:
    """Do something on the main process and give its result to all.

    Raises:
        InputError: of the main process, on all.
    """
    if world_size() == 1:
        return work()
    import torch.distributed as dist

    box: list[_Outcome | None] = [_attempt(work) if is_main() else None]
    dist.broadcast_object_list(box, src=0)
    outcome = box[0]
    assert outcome is not None
    if outcome.problem is not None:
        raise InputError(outcome.problem)
    return cast(T, outcome.value)


def together(work: Callable[[], T]) -> T:
    """Do something on every process, where what one of them cannot do fails on all.

    Raises:
        InputError: of the first process that has one, on all.
    """
    if world_size() == 1:
        return work()
    outcome = _attempt(work)
    problems = [problem for problem in gather(outcome.problem) if problem is not None]
    if problems:
        raise InputError(problems[0])
    return cast(T, outcome.value)


def _attempt(work: Callable[[], object]) -> _Outcome:
    try:
        return _Outcome(work(), None)
    except InputError as error:
        return _Outcome(None, str(error))
