"""Two processes, over gloo: rows 1, 3, 6, 14 and 15."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from .harness import REPOSITORY, Said, Tally, case, kill, mmalign, programs_of
from .numbers import finite
from .rewards import HERE, SLEEP
from .stops import slow_evaluation, slow_reward
from .toys import TOYS, difference, weights

TWO = "2 processes"
END_SECONDS = 90
RANKS = "all processes end, none with 0, within 90 s of the fault; no orphan"
OURS = ["-m", "mmalign"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=PORT"]
ACCELERATE = [
    *("-m", "accelerate.commands.launch", "--num_processes=2", "--main_process_port=PORT"),
    *("--config_file", str(REPOSITORY / "configs" / "accelerate" / "ddp.yaml")),
]


class Launched:
    """A command on two processes, each of which a launcher starts in a session of its own."""

    def __init__(self, argv: list[str], fault: str = "", by: str = "torchrun") -> None:
        """Start it.

        Args:
            argv: arguments of `mmalign`.
            fault: what `fault_cases.rank` injects; needs torchrun.
            by: torchrun, accelerate, or a configuration for mmalign's own launcher.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher = {
            "torchrun": [*TORCHRUN, "-m", "fault_cases.rank", *argv],
            "accelerate": [*ACCELERATE, *OURS, *argv],
        }.get(by, [*OURS, *argv, f"--accelerate_config={by}", "--num_processes=2"])
        env = {
            **os.environ,
            "FAULT": fault,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY / "benchmarks"),
        }
        self.log = Path("log.txt")
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, *(part.replace("=PORT", f"={port}") for part in launcher)],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=env,
            )

    def reached(self, output: Path, step: int) -> None:
        """Wait until a step is logged, or the launcher has ended."""
        while _lines(output) < step and self.process.poll() is None:
            time.sleep(0.005)

    def wait(self, seconds: float = 240) -> Said:
        """Wait for the launcher; after the time kill everything and say -9."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            code = -signal.SIGKILL
        return Said(code, self.log.read_text(errors="replace"))

    def kill(self) -> None:
        """Kill the launcher and what it has started, at once."""
        kill([self.process.pid, *programs_of(Path.cwd())])
        self.process.wait()

    def orphans(self, seconds: float = 2) -> list[int]:
        """List the processes that are left after so many seconds."""
        deadline = time.monotonic() + seconds
        while (left := programs_of(Path.cwd())) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left


def two(argv: list[str], fault: str = "", by: str = "torchrun") -> Said:
    """Run a command on two processes to its end."""
    return Launched(argv, fault, by).wait()


def _lines(output: Path) -> int:
    file = output / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _resumed(
    whole: Path, output: Path, argv: list[str], tally: Tally, by: str = "torchrun"
) -> None:
    """Count whether a run that was stopped ends bitwise as the whole one."""
    said = two(argv, by=by)
    problem = f"{said.code}: {said.error}" if said.code else difference(whole, output)
    tally.point(not problem, f"resumed: {problem}")


def _told_to_stop(
    run: Launched, output: Path, tally: Tally, ends: Callable[[int], bool], limit: int
) -> None:
    """Send SIGTERM to the launcher; count code, time, checkpoint and orphans as one point."""
    from mmalign.checkpoint import latest_checkpoint

    run.process.terminate()
    started = time.monotonic()
    said = run.wait(60)
    seconds = time.monotonic() - started
    path, left = latest_checkpoint(output / "checkpoints"), run.orphans()
    ok = ends(said.code) and seconds < limit and path is not None and not left
    tally.point(ok, f"code {said.code} after {seconds:.0f} s, {path}, orphans {left}")
    tally.answers.append(f"launcher ends with {said.code}, {path.name if path else None}")


def terminated(method: str, by: str, folder: Path, tally: Tally) -> None:
    """Send SIGTERM to the launcher in the middle; resume and compare with an undisturbed run."""
    whole, output = folder / "whole", folder / "run"
    said = two(TOYS.train(method, whole), by=by)
    tally.point(said.code == 0, f"undisturbed: code {said.code}: {said.error}")
    run = Launched(TOYS.train(method, output), by=by)
    run.reached(output, 3)
    if by in ("ddp", "fsdp2"):
        _told_to_stop(run, output, tally, lambda code: code == 143, 30)
    else:
        _told_to_stop(run, output, tally, lambda code: code != 0, 45)
    _resumed(whole, output, TOYS.train(method, output), tally, by)


for _method, _by in (
    ("diffusion-dpo", "torchrun"),
    ("d3po", "torchrun"),
    ("mapo", "accelerate"),
    ("diffusion-dpo", "ddp"),
    ("vlm-dpo", "fsdp2"),
):
    _name = {"torchrun": "", "accelerate": ", accelerate launch"}.get(
        _by, f", mmalign's launcher with {_by}"
    )
    _expects = "saved, no orphan, within 45 s (torchrun's 30 included); resumed bitwise"
    if _by in ("ddp", "fsdp2"):
        _expects = "saved, 143, no orphan, within 30 s; resumed bitwise"
    case(3, f"training, {_method}{_name}, {TWO}", _expects, limit=600)(
        partial(terminated, _method, _by)
    )


def terminated_in(
    argv: Callable[[Path], list[str]], by: str, fault: str, folder: Path, tally: Tally
) -> None:
    """Send SIGTERM to the launcher while the processes are busy for eight seconds."""
    whole, output = folder / "whole", folder / "run"
    said = two(argv(whole), by=by)
    tally.point(said.code == 0, f"undisturbed: code {said.code}: {said.error}")
    SLEEP.write_text("8")
    run = Launched(argv(output), fault, by)
    while not HERE.exists() and run.process.poll() is None:
        time.sleep(0.005)
    expected = 143 if by == "ddp" else 1
    _told_to_stop(run, output, tally, lambda code: code == expected, 30)
    SLEEP.unlink()
    _resumed(whole, output, argv(output), tally, by)


for _what, _argv, _by, _fault in (
    ("a reward", partial(slow_reward, "d3po"), "ddp", ""),
    ("evaluation during training", slow_evaluation, "ddp", ""),
    ("a save", partial(TOYS.train, "mapo"), "torchrun", "save"),
):
    case(
        3,
        f"{_what} that takes eight seconds, {TWO}",
        "finished, saved, no orphan, within 30 s; resumed bitwise",
        limit=600,
    )(partial(terminated_in, _argv, _by, _fault))


@case(
    3,
    f"a step longer than the launcher waits, {TWO}",
    "killed, no orphan; resumed bitwise from the newest checkpoint",
    limit=600,
)
def too_long(folder: Path, tally: Tally) -> None:
    """Send SIGTERM while rank 1 is in a step of ten minutes, to a launcher that waits for 3 s."""
    from mmalign.checkpoint import latest_checkpoint

    whole, output = folder / "whole", folder / "run"
    two(TOYS.train("diffusion-dpo", whole))
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "3"
    run = Launched(TOYS.train("diffusion-dpo", output), "hang")
    run.reached(output, 3)
    time.sleep(1)
    run.process.terminate()
    said = run.wait(30)
    path, left = latest_checkpoint(output / "checkpoints"), run.orphans()
    ok = said.code not in (0, -signal.SIGKILL) and not left
    ok = ok and path is not None and path.name == "checkpoint-2"
    tally.point(ok, f"code {said.code}, {path}, orphans {left}")
    tally.answers.append(f"launcher ends with {said.code}, {path.name if path else None}")
    _resumed(whole, output, TOYS.train("diffusion-dpo", output), tally)


@case(
    3,
    f"sampling before training, mmalign's launcher, {TWO}",
    "ends with 143 within 30 s, no orphan",
    limit=300,
)
def before_training(folder: Path, tally: Tally) -> None:
    """Send SIGTERM while both processes sample the base for the evaluation."""
    evaluation = (f"--evaluation.prompts={TOYS.prompts}", "--evaluation.images_per_prompt=400")
    run = Launched(TOYS.train("mapo", folder / "run", *evaluation), by="ddp")
    while "sample base" not in run.log.read_text() and run.process.poll() is None:
        time.sleep(0.01)
    run.process.terminate()
    started = time.monotonic()
    said = run.wait(60)
    seconds, left = time.monotonic() - started, run.orphans()
    ok = said.code == 143 and seconds < 30 and not left
    tally.point(ok, f"code {said.code} after {seconds:.0f} s, orphans {left}")
    tally.answers.append(f"launcher ends with {said.code}")


def rank_fault(fault: str, words: tuple[str, ...], folder: Path, tally: Tally) -> None:
    """Inject a fault into rank 1 in its fourth step."""
    output = folder / "run"
    more = ("--ddp_timeout=15",) if fault == "hang" else ()
    run = Launched(TOYS.train("diffusion-dpo", output, *more), fault)
    run.reached(output, 3)
    started = time.monotonic()
    said = run.wait(END_SECONDS)
    seconds = time.monotonic() - started
    left = run.orphans()
    ok = said.code not in (0, -signal.SIGKILL) and not left
    ok = ok and all(word in said.text for word in words)
    tally.point(ok, f"code {said.code} after {seconds:.0f} s, orphans {left}: {said.error}")
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


def one_or_two(method: str, by: str, folder: Path, tally: Tally) -> None:
    """Compare one process of 4 samples with two of 2."""
    common = ("--learning_rate=0.0001", "--max_steps=3", "--max_grad_norm=0")
    one, both = folder / "one", folder / "two"
    said = mmalign(*TOYS.train(method, one, *common, "--per_device_train_batch_size=4"))
    tally.point(said.code == 0, said.error)
    said = two(TOYS.train(method, both, *common, "--per_device_train_batch_size=2"), by=by)
    tally.point(said.code == 0, f"code {said.code}: {said.error}")
    for a, b in zip(*(map(json.loads, _log(output)) for output in (one, both)), strict=True):
        close = torch.isclose(torch.tensor(a["loss"]), torch.tensor(b["loss"]), 1e-3, 1e-5)
        tally.point(bool(close), f"loss {a['loss']} and {b['loss']}")
    first, second = weights(one), weights(both)
    gap = max(float((first[k] - second[k]).abs().max()) for k in first)
    tally.point(gap < 1e-4, f"weights differ by {gap:g}")
    tally.answers = ["loss and weights equal within rounding"]


for _method, _by in (
    *((name, "torchrun") for name in ("diffusion-dpo", "mapo", "d3po", "draft", "vlm-dpo")),
    ("mapo", "accelerate"),
    ("vlm-dpo", "fsdp2"),
):
    _name = {"torchrun": "", "accelerate": " by accelerate launch"}.get(_by, f" with {_by}")
    case(15, f"{_method}{_name}: 1 process = {TWO}", "equal within rounding", limit=300)(
        partial(one_or_two, _method, _by)
    )


def killed(folder: Path, tally: Tally) -> None:
    """SIGKILL launcher and processes; the resumed run ends bitwise as the undisturbed one."""
    whole, output = folder / "whole", folder / "run"
    two(TOYS.train("diffusion-dpo", whole))
    for line in (1, 5):
        run = Launched(TOYS.train("diffusion-dpo", output))
        run.reached(output, line)
        run.kill()
        _resumed(whole, output, TOYS.train("diffusion-dpo", output), tally)
        shutil.rmtree(output)
    tally.answers.append("bitwise the same log and weights")


case(1, f"diffusion-dpo, {TWO}: 2 kills", "bitwise the undisturbed log and weights", limit=600)(
    killed
)


@case(
    1,
    f"mmalign's launcher alone, {TWO}",
    "the processes save themselves and end within 30 s; resumed bitwise",
    limit=600,
)
def launcher_killed(folder: Path, tally: Tally) -> None:
    """SIGKILL the launcher, which then can end nothing any more."""
    from mmalign.checkpoint import latest_checkpoint

    whole, output = folder / "whole", folder / "run"
    run = Launched(TOYS.train("diffusion-dpo", output, "--max_steps=1000"), by="ddp")
    run.reached(output, 3)
    run.process.kill()
    left, path = run.orphans(30), latest_checkpoint(output / "checkpoints")
    run.kill()
    steps = _lines(output)
    ok = not left and steps < 1000 and path is not None and path.name == f"checkpoint-{steps}"
    tally.point(ok, f"orphans {left}, {steps} steps, {path}")
    tally.answers.append("saved after the step it was in")
    more = f"--max_steps={steps + 2}"
    for place in (whole, output):
        said = two(TOYS.train("diffusion-dpo", place, more), by="ddp")
        tally.point(said.code == 0, f"code {said.code}: {said.error}")
    problem = difference(whole, output)
    tally.point(not problem, f"resumed: {problem}")
