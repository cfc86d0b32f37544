"""Row 5: checkpoints that are damaged, or of another run."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mmalign.training_state import BATCH

from .harness import Tally, case, mmalign
from .toys import TOYS, difference

FALLS_BACK = "falls back to the valid one before with a warning; bitwise the same end"
REFUSES = "refused in one line, nothing loaded"


def _run(folder: Path, method: str = "mapo") -> tuple[Path, Path]:
    """Make an undisturbed run and one with checkpoints of steps 2 and 4."""
    whole, output = folder / "whole", folder / "run"
    mmalign(*TOYS.train(method, whole))
    said = mmalign(*TOYS.train(method, output, "--max_steps=4"))
    assert said.code == 0, said.error
    return whole, output


def flip(path: Path) -> None:
    """Flip one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated weights": lambda path: _truncate(path / "model.safetensors"),
    "flipped bit in the weights": lambda path: flip(path / "model.safetensors"),
    "flipped bit in the optimizer": lambda path: flip(path / "training.safetensors"),
    "flipped bit in the state": lambda path: flip(path / "state.json"),
    "missing file": lambda path: (path / "training.safetensors").unlink(),
    "missing manifest": lambda path: (path / "manifest.json").unlink(),
    "empty folder": lambda path: [file.unlink() for file in path.iterdir()],
    "manifest of another step": lambda path: edit(path / "manifest.json", step=3),
    "manifest that is no JSON": lambda path: (path / "manifest.json").write_text("{" * 100_000),
}


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@case(5, "newest checkpoint damaged", FALLS_BACK)
def newest_damaged(folder: Path, tally: Tally) -> None:
    """Damage the newest checkpoint in every way."""
    whole, base = _run(folder)
    for name, damage in DAMAGES.items():
        output = folder / "damaged"
        shutil.copytree(base, output)
        damage(output / "checkpoints" / "checkpoint-4")
        said = mmalign(*TOYS.train("mapo", output))
        problem = said.error if said.code else difference(whole, output)
        if not problem and "skipped a damaged checkpoint" not in said.text:
            problem = "no warning"
        tally.point(not problem, f"{name}: {problem}" if problem else "")
        shutil.rmtree(output)
    tally.answers.append(f"{', '.join(DAMAGES)}: warned, fell back, same bits")


@case(5, "every checkpoint damaged", REFUSES)
def all_damaged(folder: Path, tally: Tally) -> None:
    """Damage both; the run must not start over silently."""
    _, output = _run(folder)
    for path in (output / "checkpoints").iterdir():
        flip(path / "model.safetensors")
    tally.refused(mmalign(*TOYS.train("mapo", output)), "checkpoints are damaged")


@case(5, "damaged checkpoint by name", REFUSES, quick=True)
def named_damaged(folder: Path, tally: Tally) -> None:
    """Ask for the damaged one itself."""
    output = folder / "run"
    mmalign(*TOYS.train("mapo", output, "--max_steps=2"))
    path = output / "checkpoints" / "checkpoint-2"
    flip(path / "model.safetensors")
    argv = TOYS.train("mapo", output, f"--resume_from_checkpoint={path}")
    tally.refused(mmalign(*argv), "SHA-256")


def other_run(changes: list[str], words: str, folder: Path, tally: Tally) -> None:
    """Resume with options of another run."""
    _, output = _run(folder)
    argv = TOYS.train("mapo", output, *changes)
    tally.refused(mmalign(*argv), words)


for _name, _changes, _words in (
    ("of another seed", ["--seed=7"], "seed was 0, now 7"),
    ("of another batch size", ["--per_device_train_batch_size=3"], "was 2, now 3"),
    ("of another LoRA", ["--lora.rank=3"], "trained weights differ"),
    ("with an average", ["--ema_decay=0.9"], "ema was False, now True"),
):
    case(5, f"checkpoint {_name}", REFUSES)(partial(other_run, _changes, _words))


@case(5, "checkpoint of another method", REFUSES)
def other_method(folder: Path, tally: Tally) -> None:
    """Resume a run of MaPO as DRO."""
    _, output = _run(folder)
    said = mmalign(*TOYS.train("dro", output))
    tally.refused(said, "config was MapoConfig, now DroConfig")


@case(5, "checkpoint of another number of processes", REFUSES)
def other_world(folder: Path, tally: Tally) -> None:
    """Resume, as one process, what two wrote with twice the samples in a step."""
    _, output = _run(folder)
    old = {"per_device_train_batch_size": 2, "num_processes": 2, "gradient_accumulation_steps": 1}
    for factors in ({}, old):  # as today's checkpoints say it, and as the first ones did
        for path in (output / "checkpoints").iterdir():
            state = json.loads((path / "state.json").read_text())
            kept = {k: v for k, v in state["run"].items() if k in ("config", "seed")}
            forge(path, {**state, "run": {**kept, **(factors or {BATCH: 4})}})
        said = mmalign(*TOYS.train("mapo", output))
        tally.refused(said, "cannot resume", "x processes)", "was 4, now 2")


def forge(path: Path, state: Any) -> None:
    """Replace the state of a checkpoint and make its manifest fit."""
    data = json.dumps(state).encode()
    (path / "state.json").write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.json"] = {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    (path / "manifest.json").write_text(json.dumps(manifest))


FORGERIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda state: [],
    "no training": lambda state: {"run": state["run"]},
    "training is text": lambda state: {**state, "training": "x"},
    "unknown tensor": lambda state: {**state, "training": {"tensor": "nowhere"}},
    "no parts": lambda state: {**state, "training": {"dict": []}},
    "part without keys": lambda state: {**state, "training": _without_meter(state["training"])},
    "two kinds": lambda state: {**state, "training": {"dict": [], "list": []}},
}


def _without_meter(training: Any) -> Any:
    text = json.dumps(training).replace('"unet_forwards"', '"other"')
    return json.loads(text.replace('"skipped"', '"slipped"'))


@case(5, "forged state with a manifest that fits", REFUSES)
def forged(folder: Path, tally: Tally) -> None:
    """Give the loader a state that no run wrote."""
    _, base = _run(folder)
    for forgery in FORGERIES.values():
        output = folder / "forged"
        shutil.copytree(base, output)
        for path in (output / "checkpoints").iterdir():
            forge(path, forgery(json.loads((path / "state.json").read_text())))
        tally.refused(mmalign(*TOYS.train("mapo", output)), "checkpoint-4")
        shutil.rmtree(output)
