"""Rows 1 and 2: killed at any moment, a run continues bit for bit."""

from __future__ import annotations

import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from .harness import Command, Tally, case, die_at, fork, mmalign
from .toys import METHODS, TOYS, difference

KILLS = 20
WRITERS = ("checkpoint.py", "data/files.py", "metrics_log.py", "mmalign/lora.py", "report.py")


def kill_randomly(method: str, kills: int, folder: Path, tally: Tally) -> None:
    """Kill a run at random moments, once each; every one resumes to the undisturbed end."""
    whole = folder / "whole"
    log = folder / "log.txt"
    started = time.monotonic()
    said = mmalign(*TOYS.train(method, whole), log=log)
    span = time.monotonic() - started
    assert said.code == 0, said.error
    points = random.Random(method)
    lines = []
    for number in range(kills):
        parts = folder / str(number)
        lines.append(_kill_once(TOYS.train(method, parts), parts, log, points, span))
        said = mmalign(*TOYS.train(method, parts), log=log)
        problem = said.error if said.code else difference(whole, parts)
        tally.point(not problem, problem)
        shutil.rmtree(parts)
    inside = sum(line > 0 for line in lines)
    tally.answers.append(
        f"bitwise the same log and weights; {inside} of {kills} kills with steps already logged"
    )


def _kill_once(argv: list[str], output: Path, log: Path, points: random.Random, span: float) -> int:
    """Kill the command at a random moment before its end; returns the steps it had logged."""
    while True:
        command = Command(argv, log)
        time.sleep(points.uniform(0.05, 1.0) * span)
        command.send(signal.SIGKILL)
        if command.wait().code == -signal.SIGKILL:
            file = output / "metrics.jsonl"
            return file.read_bytes().count(b"\n") if file.exists() else 0
        shutil.rmtree(output)  # it had finished: not a kill


for _method in METHODS:
    case(
        1,
        f"{_method}: {KILLS} kills",
        "bitwise the undisturbed log and weights",
        limit=900,
    )(partial(kill_randomly, _method, KILLS))


def at_every_point(
    prepare: Callable[[Path], object],
    attempt: Callable[[Path], object],
    check: Callable[[Path], str],
    folder: Path,
    tally: Tally,
) -> None:
    """Kill `attempt` at every point of its file work, each in a fresh folder, and check each."""
    for number in range(1, 5000):
        place = folder / str(number)
        place.mkdir()
        prepare(place)

        def dying(place: Path = place, number: int = number) -> None:
            die_at(number, WRITERS)
            attempt(place)

        code = fork(dying)
        if code != -signal.SIGKILL:
            assert code == 0, f"the undisturbed attempt ended with {code}"
            break
        try:
            problem = check(place)
        except Exception as error:
            problem = f"point {number}: {type(error).__name__}: {error}"
        tally.point(not problem, problem or "")
        shutil.rmtree(place)


def _save(place: Path, step: int, keep: int = 1) -> None:
    from mmalign.checkpoint import save_checkpoint

    tensors = {"model": {"w": torch.full((8,), float(step))}, "training": {"m": torch.ones(3)}}
    save_checkpoint(place / "checkpoints", step, tensors, {"step": step}, keep)


@case(2, "checkpoint, replacing the only one", "a valid checkpoint always; the next save works")
def checkpoint_boundaries(folder: Path, tally: Tally) -> None:
    """Kill a save that rotates the only other checkpoint away."""

    def check(place: Path) -> str:
        from mmalign.checkpoint import latest_checkpoint, load_checkpoint

        path = latest_checkpoint(place / "checkpoints")
        if path is None:
            return "no checkpoint is left"
        loaded = load_checkpoint(path)
        if float(loaded.tensors["model"]["w"][0]) != loaded.step:
            return "contents of another step"
        _save(place, 2)
        left = sorted(p.name for p in (place / "checkpoints").iterdir())
        return "" if left == ["checkpoint-2"] else f"leaves {left}"

    at_every_point(
        lambda place: _save(place, 1), lambda place: _save(place, 2), check, folder, tally
    )
    tally.answers = ["old or new checkpoint valid; the next save leaves nothing else"]


@case(2, "last step and files of a run", "the resumed run ends bitwise the same", limit=900)
def run_boundaries(folder: Path, tally: Tally) -> None:
    """Kill a run before each file that it writes in and after its last step, and in between."""
    base, whole = folder / "base", folder / "whole"
    log = folder / "log.txt"
    short, full = "--max_steps=2", "--max_steps=3"
    for output, options in ((base, [short]), (whole, [short]), (whole, [full])):
        assert mmalign(*TOYS.train("mapo", output, *options), log=log).code == 0
    argv = TOYS.train("mapo", folder / "run", full)
    tried = []
    for within, most in (((), sys.maxsize), (WRITERS, 20)):
        total = _count_points(argv, within, base, folder / "run")
        step = max(1, total // most)
        tried.append(len(range(1, total + 1, step)))
        for number in range(1, total + 1, step):
            place = folder / "run"
            shutil.copytree(base, place)

            def dying(number: int = number, within: tuple[str, ...] = within) -> None:
                from mmalign.cli import main

                die_at(number, within)
                main(argv)

            code = fork(dying)
            said = mmalign(*argv, log=log)
            problem = said.error if said.code else difference(whole, place)
            if code != -signal.SIGKILL:
                problem = f"was not killed at point {number}: {code}"
            usual = {p.name for p in whole.rglob(".*")}
            left = [p.name for p in place.rglob(".*") if p.name not in usual]
            tally.point(not problem and not left, problem or f"leaves {left[:3]}")
            shutil.rmtree(place)
    tally.answers.append(
        f"bitwise the same; all {tried[0]} boundaries of files, and {tried[1]} lines between them"
    )


def _count_points(argv: list[str], within: tuple[str, ...], base: Path, output: Path) -> int:
    shutil.copytree(base, output)
    file = output.with_suffix(".count")

    def counted() -> None:
        from mmalign.cli import main

        count = die_at(-1, within)
        main(argv)
        file.write_text(str(count[0]))

    assert fork(counted) == 0
    shutil.rmtree(output)
    return int(file.read_text())


@case(2, "adapter file", "the old or the new file, whole", quick=True)
def file_boundaries(folder: Path, tally: Tally) -> None:
    """Kill the writer that every file of a run goes through."""
    from mmalign.data.files import write_bytes

    def check(place: Path) -> str:
        content = (place / "file").read_bytes()
        return "" if content in (b"old" * 1000, b"new" * 2000) else f"{len(content)} bytes"

    at_every_point(
        lambda place: write_bytes(place / "file", b"old" * 1000),
        lambda place: write_bytes(place / "file", b"new" * 2000),
        check,
        folder,
        tally,
    )
    tally.answers = ["the file is the old one or the new one"]
