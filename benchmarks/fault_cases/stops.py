"""Row 3, one process: SIGTERM wherever a run is, then resume."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from .harness import Command, Said, Tally, case, mmalign
from .rank import rest_in_save
from .rewards import HERE, SLEEP
from .toys import TOYS, difference

ALLOWED_SECONDS = 30
TERMINATED = (143, -signal.SIGTERM)
"""Exit code as a shell counts it, or the signal itself where nothing needs saving."""
EXPECTS = "exit 143 within 30 s, a valid checkpoint, resumed bitwise"
SLOW = '--rewards=[{"name": "fault_cases.rewards:slow"}]'
SLOW_EVALUATION = '--evaluation.rewards=[{"name": "fault_cases.rewards:slow"}]'


class Program(Command):
    """`mmalign ARGV` as a user starts it: a process, and a group, of its own."""

    def __init__(self, argv: list[str], log: Path) -> None:
        """Start it."""
        self.log, self.code = log, None
        with log.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "mmalign", *argv],
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        self.pid, self._process, self.whole_group = process.pid, process, False

    def send(self, number: int) -> None:
        """Send a signal to it, or to all of its group."""
        if not self.ended:
            (os.killpg if self.whole_group else os.kill)(self.pid, number)

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        self.code = self._process.poll()
        return self.code is not None

    @property
    def orphans(self) -> bool:
        """Whether a process of the group is left, after some patience."""
        return not gone(lambda: os.killpg(self.pid, 0))


def gone(look: Callable[[], object]) -> bool:
    """Tell whether looking at a process fails within ten seconds."""
    for _ in range(200):
        try:
            look()
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def terminate(
    argv: list[str],
    output: Path,
    ready: Callable[[], bool],
    tally: Tally,
    command: Command | None = None,
) -> Said:
    """Start a run, send SIGTERM when it is `ready`, and time its end."""
    from mmalign.checkpoint import latest_checkpoint

    command = command or Command(argv, Path("log.txt"))
    deadline = time.monotonic() + 90
    while not ready() and not command.ended and time.monotonic() < deadline:
        time.sleep(0.002)
    command.send(signal.SIGTERM)
    sent = time.monotonic()
    said = command.wait(ALLOWED_SECONDS + 5)
    seconds = time.monotonic() - sent
    ok = said.code in TERMINATED and seconds < ALLOWED_SECONDS
    path = latest_checkpoint(output / "checkpoints")
    if not ok or path is None:
        tally.point(False, f"code {said.code} after {seconds:.1f} s, checkpoint {path}")
        return said
    tally.point(True)
    tally.answers.append(f"143 after {_at_most(seconds)} s, {path.name}")
    return said


def _at_most(seconds: float) -> str:
    return f"< {max(1, int(seconds) + 1)}"


def compare(argv: list[str], whole: Path, output: Path, tally: Tally) -> None:
    """Resume and compare with the undisturbed run."""
    if tally.failures:
        return
    said = mmalign(*argv)
    problem = said.error if said.code else difference(whole, output)
    rows = [folder / "evaluations.jsonl" for folder in (whole, output)]
    if not problem and rows[0].exists() and rows[0].read_bytes() != rows[1].read_bytes():
        problem = "other evaluations.jsonl"
    tally.point(not problem, problem)


def lines(output: Path) -> int:
    """Count the steps that a run has logged."""
    file = output / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def stop_at_lines(method: str, folder: Path, tally: Tally) -> None:
    """Terminate during training, early and late."""
    whole, output = folder / "whole", folder / "run"
    mmalign(*TOYS.train(method, whole))
    for line in (1, 4, 7):
        argv = TOYS.train(method, output)
        terminate(argv, output, lambda line=line: lines(output) >= line, tally)
        compare(argv, whole, output, tally)
        shutil.rmtree(output)


@case(3, "training, Ctrl-C", "exit 130, a valid checkpoint, resumed bitwise")
def interrupt(folder: Path, tally: Tally) -> None:
    """Press Ctrl-C once."""
    from mmalign.checkpoint import latest_checkpoint

    whole, output = folder / "whole", folder / "run"
    mmalign(*TOYS.train("mapo", whole))
    argv = TOYS.train("mapo", output)
    # What a shell starts in the background ignores Ctrl-C, and so would this process.
    handler = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    command = Command(argv, Path("log.txt"), handler)
    while lines(output) < 4 and not command.ended:
        time.sleep(0.002)
    command.send(signal.SIGINT)
    said = command.wait(ALLOWED_SECONDS)
    left = latest_checkpoint(output / "checkpoints")
    ok = said.code == 130 and left is not None and "Traceback" not in said.text
    tally.point(ok, f"code {said.code}, checkpoint {left}")
    compare(argv, whole, output, tally)


for _method in ("diffusion-dpo", "tailorpo", "draft", "vlm-dpo"):
    case(3, f"training, {_method}", EXPECTS)(functools.partial(stop_at_lines, _method))


def stop_in(argv: Callable[[Path], list[str]], folder: Path, tally: Tally) -> None:
    """Terminate a run whose slow reward has been reached; whether it sleeps is a file's matter."""
    whole, output = folder / "whole", folder / "run"
    said = mmalign(*argv(whole))
    assert said.code == 0, said.error
    SLEEP.touch()
    terminate(argv(output), output, HERE.exists, tally)
    SLEEP.unlink()
    compare(argv(output), whole, output, tally)


def slow_reward(method: str, output: Path) -> list[str]:
    """Give a run whose reward may sleep."""
    return TOYS.train(method, output, SLOW)


for _method in ("d3po", "tailorpo"):
    case(3, f"a reward that takes two minutes, {_method}", EXPECTS)(
        functools.partial(stop_in, functools.partial(slow_reward, _method))
    )


def slow_evaluation(output: Path) -> list[str]:
    """Give a run whose evaluation after each step may sleep."""
    evaluation = (f"--evaluation.prompts={TOYS.prompts}", "--evaluation.every_steps=1")
    images = ("--evaluation.images_per_prompt=1", SLOW_EVALUATION, "--save_steps=100")
    stopping = (
        "--evaluation.early_stopping_metric=fault_cases.rewards:slow",
        "--evaluation.early_stopping_patience=9",
    )
    return TOYS.train("mapo", output, *evaluation, *images, *stopping)


case(3, "evaluation during training that takes two minutes", EXPECTS)(
    functools.partial(stop_in, slow_evaluation)
)


PROGRAM = """
import json, os, subprocess, sys, time
from pathlib import Path
children = [os.getpid(), subprocess.Popen(["sleep", "600"]).pid]
Path("pids").write_text(json.dumps(children))
for number, line in enumerate(sys.stdin):
    if number >= 3 and Path("sleep").exists():
        Path("here").touch()
        time.sleep(600)
    images = json.loads(line)["images"]
    print(json.dumps({"rewards": [len(image) % 97 / 97 for image in images]}), flush=True)
"""


@case(
    3, "a program as reward that takes ten minutes, a process of its own", f"{EXPECTS}; no orphan"
)
def stop_in_program(folder: Path, tally: Tally) -> None:
    """The program, and what it has started, end with the run."""
    whole, output = folder / "whole", folder / "run"
    (folder / "program.py").write_text(PROGRAM)
    options = json.dumps({"command": [sys.executable, str(folder / "program.py")]})
    reward = f'--rewards=[{{"name": "command", "options": {options}}}]'
    argv = TOYS.train("d3po", output, reward)
    said = mmalign(*TOYS.train("d3po", whole, reward))
    assert said.code == 0, said.error
    SLEEP.touch()
    program = Program(argv, Path("log.txt"))
    terminate(argv, output, HERE.exists, tally, program)
    SLEEP.unlink()
    for pid in json.loads(Path("pids").read_text()):
        tally.point(gone(lambda pid=pid: os.kill(pid, 0)), "the program is left behind")
    tally.point(not program.orphans, "processes are left behind")
    compare(argv, whole, output, tally)


@case(3, "training with two loaders, SIGTERM to all of the group", f"{EXPECTS}; no orphan")
def stop_with_workers(folder: Path, tally: Tally) -> None:
    """A cluster's manager signals the loading processes as well as the run."""
    whole, output = folder / "whole", folder / "run"
    more = ("--num_workers=2", "--max_steps=200", "--save_steps=50")
    argv = TOYS.train("mapo", output, *more)
    mmalign(*TOYS.train("mapo", whole, *more))
    program = Program(argv, Path("log.txt"))
    program.whole_group = True
    terminate(argv, output, lambda: lines(output) >= 3, tally, program)
    tally.point(not program.orphans, "processes are left behind")
    compare(argv, whole, output, tally)


@case(3, "sampling inside a step", EXPECTS)
def stop_in_sampling(folder: Path, tally: Tally) -> None:
    """Terminate while a step samples: the sampler is slowed down in its third step."""
    whole, output = folder / "whole", folder / "run"
    argv = TOYS.train("d3po", output)
    mmalign(*TOYS.train("d3po", whole))
    from mmalign.rollout import Sampler

    original, calls = Sampler.output, [0]

    def slow(self: Sampler, *arguments: object) -> object:
        calls[0] += 1
        if calls[0] == 25 and SLEEP.exists():
            HERE.touch()
            time.sleep(120)
        return original(self, *arguments)  # type: ignore[arg-type]

    Sampler.output = slow  # type: ignore[assignment, method-assign]
    SLEEP.touch()
    terminate(argv, output, HERE.exists, tally)
    SLEEP.unlink()
    compare(argv, whole, output, tally)


@case(3, "inside a save", EXPECTS)
def stop_in_save(folder: Path, tally: Tally) -> None:
    """Terminate in the middle of writing the second checkpoint."""
    whole, output = folder / "whole", folder / "run"
    argv = TOYS.train("mapo", output)
    mmalign(*TOYS.train("mapo", whole))
    rest_in_save()
    SLEEP.touch()
    terminate(argv, output, HERE.exists, tally)
    SLEEP.unlink()
    compare(argv, whole, output, tally)


@case(3, "sampling before and after training", "ends at once; resumed bitwise")
def stop_outside_training(folder: Path, tally: Tally) -> None:
    """Terminate while the base, then the aligned model, is sampled for the final evaluation."""
    evaluation = (f"--evaluation.prompts={TOYS.prompts}", "--evaluation.images_per_prompt=40")
    small = ("--max_steps=3", "--sampling.num_inference_steps=20")
    whole, output = folder / "whole", folder / "run"
    mmalign(*TOYS.train("mapo", whole, *evaluation, *small))
    argv = TOYS.train("mapo", output, *evaluation, *small)
    log = Path("log.txt")
    for moment, words in (("before", "sample base"), ("after", "sample aligned")):
        command = Command(argv, log)
        while not command.ended and words not in (log.read_text() if log.exists() else ""):
            time.sleep(0.002)
        command.send(signal.SIGTERM)
        said = command.wait(ALLOWED_SECONDS)
        tally.point(said.code in TERMINATED, f"{moment} training: {said.code}")
    compare(argv, whole, output, tally)
    tally.answers = ["ends at once; resumed bitwise"]


@case(3, "waiting for people's answers", "exit 143 within 30 s; there is nothing to save in step 1")
def stop_waiting_for_people(folder: Path, tally: Tally) -> None:
    """Terminate a run that waits in its first step for judgements."""
    from mmalign.checkpoint import latest_checkpoint

    output = folder / "run"
    people = f'--rewards=[{{"name": "people", "options": {{"folder": "{folder / "people"}"}}}}]'
    command = Command(TOYS.train("d3po", output, people), Path("log.txt"))
    deadline = time.monotonic() + 90
    while "waiting for people" not in _text(Path("log.txt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    command.send(signal.SIGTERM)
    said = command.wait(ALLOWED_SECONDS)
    left = latest_checkpoint(output / "checkpoints")
    tally.point(said.code == 143 and left is None, f"code {said.code}; nothing to save in step 1")


def _text(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""
