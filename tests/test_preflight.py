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
