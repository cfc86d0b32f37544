"""Two processes, over gloo: rows 3, 6, 14 and 15."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from .harness import REPOSITORY, Said, Tally, case, mmalign
from .toys import TOYS, difference, weights

TWO = "2 processes"
END_SECONDS = 90
RANKS = "all processes end, none with 0, within 90 s; no orphan"


class Launched:
    """A command on two processes, started by torchrun in a process group of its own."""

    def __init__(self, argv: list[str], fault: str = "") -> None:
        """Start it; `fault` is injected by `fault_cases.rank`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
        env = {
            **os.environ,
            "FAULT": fault,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY / "benchmarks"),
        }
        self.log = Path("log.txt")
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, "-m", "fault_cases.rank", *argv],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )

    def wait(self, seconds: float = 240) -> Said:
        """Wait for the launcher; after the time kill the whole group and say -9."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            code = -signal.SIGKILL
            self.process.wait()
        return Said(code, self.log.read_text(errors="replace"))

    @property
    def orphans(self) -> bool:
        """Whether a process of the group is left."""
        for _ in range(40):
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                return False
            time.sleep(0.05)
        return True


def two(argv: list[str], fault: str = "") -> Said:
    """Run a command on two processes to its end."""
    return Launched(argv, fault).wait()


def _lines(output: Path) -> int:
    file = output / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def terminated(method: str, folder: Path, tally: Tally) -> None:
    """Send SIGTERM to the launcher in the middle; resume and compare with an undisturbed run."""
    from mmalign.checkpoint import latest_checkpoint

    whole, output = folder / "whole", folder / "run"
    said = two(TOYS.train(method, whole))
    tally.point(said.code == 0, f"undisturbed: code {said.code}: {said.error}")
    run = Launched(TOYS.train(method, output))
    while _lines(output) < 3 and run.process.poll() is None:
        time.sleep(0.01)
    run.process.terminate()
    started = time.monotonic()
    said = run.wait(60)
    seconds = time.monotonic() - started
    path = latest_checkpoint(output / "checkpoints")
    ok = said.code != 0 and seconds < 45 and path is not None and not run.orphans
    tally.point(ok, f"code {said.code} after {seconds:.0f} s, {path}")
    tally.answers.append(f"launcher ends with {said.code}, {path.name if path else None}")
    said = two(TOYS.train(method, output))
    problem = f"{said.code}: {said.error}" if said.code else difference(whole, output)
    tally.point(not problem, f"resumed: {problem}")


for _method in ("diffusion-dpo", "d3po"):
    case(
        3,
        f"training, {_method}, {TWO}",
        "saved, no orphan, within 45 s (torchrun's 30 included); resumed bitwise",
        limit=600,
    )(partial(terminated, _method))


def rank_fault(fault: str, words: tuple[str, ...], folder: Path, tally: Tally) -> None:
    """Inject a fault into rank 1 in its fourth step."""
    output = folder / "run"
    from mmalign.config import TrainConfig

    can_wait = fault == "hang" and hasattr(TrainConfig(), "ddp_timeout")
    more = ("--ddp_timeout=15",) if can_wait else ()
    run = Launched(TOYS.train("diffusion-dpo", output, *more), fault)
    started = time.monotonic()
    said = run.wait(END_SECONDS)
    seconds = time.monotonic() - started
    ok = said.code not in (0, -signal.SIGKILL) and not run.orphans
    ok = ok and all(word in said.text for word in words)
    tally.point(ok, f"code {said.code} after {seconds:.0f} s: {said.error}")
    tally.answers.append(f"launcher ends with {said.code}")


for _fault, _words in (
    ("raise", ("rank 1 fails",)),
    ("die", ()),
    ("exit", ()),
    ("hang", ()),
):
    case(14, f"rank 1: {_fault}, {TWO}", RANKS, limit=300)(partial(rank_fault, _fault, _words))


def nan_on_one_rank(policy: str, folder: Path, tally: Tally) -> None:
    """Make the loss of rank 1 NaN in step 4."""
    output = folder / "run"
    said = two(TOYS.train("diffusion-dpo", output, f"--on_nan={policy}"), "nan")
    if policy == "stop":
        tally.point(said.code not in (0, -signal.SIGKILL), f"code {said.code}: {said.error}")
        tally.point("step 4: loss nan" in said.text, f"does not name the step: {said.error}")
    else:
        tally.point(said.code == 0, f"code {said.code}: {said.error}")
        marked = sum('"skipped": 1.0' in line for line in _log(output))
        tally.point(marked == 1, f"{marked} steps skipped")
    from .numbers import finite

    problem = finite(output)
    tally.point(not problem, problem)
    tally.answers.append("both processes " + ("stop" if policy == "stop" else "skip the step"))


def _log(output: Path) -> list[str]:
    return (output / "metrics.jsonl").read_text().splitlines()


for _policy in ("stop", "skip"):
    case(
        6,
        f"NaN on one rank only, on_nan: {_policy}, {TWO}",
        "both agree; weights stay finite",
        limit=300,
    )(partial(nan_on_one_rank, _policy))


def one_or_two(method: str, folder: Path, tally: Tally) -> None:
    """Compare one process of 4 samples with two of 2."""
    common = ("--learning_rate=0.0001", "--max_steps=3", "--max_grad_norm=0")
    one, both = folder / "one", folder / "two"
    said = mmalign(*TOYS.train(method, one, *common, "--per_device_train_batch_size=4"))
    tally.point(said.code == 0, said.error)
    said = two(TOYS.train(method, both, *common, "--per_device_train_batch_size=2"))
    tally.point(said.code == 0, f"code {said.code}: {said.error}")
    for a, b in zip(*(map(json.loads, _log(output)) for output in (one, both)), strict=True):
        close = torch.isclose(torch.tensor(a["loss"]), torch.tensor(b["loss"]), 1e-3, 1e-5)
        tally.point(bool(close), f"loss {a['loss']} and {b['loss']}")
    first, second = weights(one), weights(both)
    gap = max(float((first[k] - second[k]).abs().max()) for k in first)
    tally.point(gap < 1e-4, f"weights differ by {gap:g}")
    tally.answers = ["loss and weights equal within rounding"]


for _method in ("diffusion-dpo", "mapo", "d3po", "draft", "vlm-dpo"):
    case(15, f"{_method}: 1 process = {TWO}", "equal within rounding", limit=300)(
        partial(one_or_two, _method)
    )


def killed(folder: Path, tally: Tally) -> None:
    """SIGKILL the launcher's whole group; the resumed run ends bitwise as the undisturbed one."""
    whole, output = folder / "whole", folder / "run"
    two(TOYS.train("diffusion-dpo", whole))
    for line in (1, 5):
        run = Launched(TOYS.train("diffusion-dpo", output))
        while _lines(output) < line and run.process.poll() is None:
            time.sleep(0.005)
        os.killpg(run.process.pid, signal.SIGKILL)
        run.wait()
        said = two(TOYS.train("diffusion-dpo", output))
        problem = f"{said.code}: {said.error}" if said.code else difference(whole, output)
        tally.point(not problem, problem)
        shutil.rmtree(output)
    tally.answers.append("bitwise the same log and weights")


case(1, f"diffusion-dpo, {TWO}: 2 kills", "bitwise the undisturbed log and weights", limit=600)(
    killed
)
