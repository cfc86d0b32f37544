"""What is checked before anything is loaded: values, and paths to read and write."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

PAIRS = ["--pairs.path", "."]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "pairs.path: is required"),
        (["--pairs.path", "absent"], "pairs.path: no such file or folder: absent"),
        ([*PAIRS, "--evaluation.prompts", "absent.txt"], "evaluation.prompts: no such file"),
        ([*PAIRS, "--model", "./absent"], "model: no such file or folder: ./absent"),
        ([*PAIRS, "--max_steps", "0"], "max_steps: must be at least 1, got 0"),
        ([*PAIRS, "--learning_rate", "-1"], "learning_rate: must be at least 0, got -1"),
        ([*PAIRS, "--beta", "-1"], "beta: must be at least 0, got -1"),
        ([*PAIRS, "--beta", ".nan"], "beta: must be a finite number"),
        ([*PAIRS, "--caption_dropout", "1.5"], "caption_dropout: must be between 0 and 1"),
        ([*PAIRS, "--lora.rank", "0"], "lora.rank: must be at least 1"),
        ([*PAIRS, "--evaluation.rewards", "[{batch_size: 0}]"], "evaluation.rewards[0].batch_size"),
        ([*PAIRS, "--output_dir", "file/run"], "output_dir: "),
        ([*PAIRS, "--resume_from_checkpoint", "absent"], "resume_from_checkpoint: no such folder"),
        ([*PAIRS, "--output_dir", "used"], "output_dir: used/checkpoints holds checkpoints"),
    ],
)
def test_wrong_values(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: Callable[..., str],
    flags: list[str],
    message: str,
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "used/checkpoints/checkpoint-5").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    flags = flags if "--model" in flags else ["--model", "./model", *flags]
    assert fails("train", "diffusion-dpo", *flags).startswith(message)


def test_shard_must_exist(tmp_path: Path, fails: Callable[..., str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n")
    flags = ["--prompts", str(prompts), "--model", str(tmp_path), "--num_shards", "2"]
    assert fails("pairs", "build", *flags, "--shard", "2").startswith("shard: 2 must be below")


def test_output_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    def refuse(dir: Path) -> None:  # root may write anywhere
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    flags = ["--model", str(tmp_path), "--output", str(tmp_path / "new" / "images")]
    assert fails("generate", *flags) == (
        f"output: {tmp_path} is not writable (Read-only file system),"
        f" so {tmp_path}/new/images cannot be created"
    )


def test_output_folder_that_is_a_file(tmp_path: Path, fails: Callable[..., str]) -> None:
    (file := tmp_path / "images").touch()
    flags = ["--model", str(tmp_path), "--output", str(file)]
    assert fails("generate", *flags) == f"output: {file} is a file, so {file} cannot be created"


@pytest.mark.parametrize(
    ("method", "flags", "message"),
    [
        (
            "mapo",
            ["--loss_type", "ipo", "--label_smoothing", "0.4", "--length_normalize", "true"],
            "mapo fixes its losses: leave out loss_type ipo, label_smoothing 0.4,"
            " length_normalize True",
        ),
        (
            "diffusion-kto",
            ["--label_smoothing", "0.4"],
            "diffusion-kto fixes its losses: leave out label_smoothing 0.4",
        ),
        ("dro", ["--alpha", "0.1"], "dro fixes its losses: leave out alpha 0.1"),
        (
            "diffusion-dpo",
            ["--label_smoothing", "0.4"],
            "label_smoothing: loss_type sigmoid does not use it, only aot, aot_unpaired, cdpo,"
            " exo_pair, robust; leave it out or choose such a loss_type",
        ),
        (
            "curriculum-dpo",
            ["--loss_type", "ipo", "--discopop_tau", "0.1"],
            "discopop_tau: loss_type ipo does not use it, only discopop; leave it out or choose"
            " such a loss_type",
        ),
        (
            "vlm-dpo",
            ["--offset_scale", "2"],
            "offset_scale: loss_type sigmoid does not use it, only offset; leave it out or choose"
            " such a loss_type",
        ),
        (
            "diffusion-dpo",
            ["--loss_type", "simpo"],
            "loss_type: simpo exists for texts only; use another one",
        ),
        (
            "diffusion-dpo",
            ["--length_normalize", "true"],
            "length_normalize: images have no length; leave it out",
        ),
    ],
)
def test_options_of_the_loss_that_would_be_ignored(
    tmp_path: Path, fails: Callable[..., str], method: str, flags: list[str], message: str
) -> None:
    given = ["--pairs.path", str(tmp_path), "--model", str(tmp_path)]
    assert fails("train", method, *given, *flags) == message


@pytest.mark.parametrize(
    "flags",
    [
        ["--loss_type", "robust", "--label_smoothing", "0.1"],
        ["--loss_type", "offset", "--offset_scale", "2"],
        ["--loss_type", "discopop", "--discopop_tau", "0.1"],
        ["--loss_type", "alpha", "--alpha", "0.1"],
    ],
)
def test_options_of_the_loss_that_are_used(
    tmp_path: Path, fails: Callable[..., str], flags: list[str]
) -> None:
    given = ["--pairs.path", str(tmp_path), "--model", str(tmp_path)]
    plain = fails("train", "diffusion-dpo", *given)  # there are no pairs in the folder
    assert fails("train", "diffusion-dpo", *given, *flags) == plain
    used = fails("train", "mapo", *given, "--loss_type", "sigmoid", "--label_smoothing", "0")
    assert used == plain
