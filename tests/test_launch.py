"""Commands in several processes, started by mmalign itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mmalign.config import is_installed
from mmalign.launch import config_file, take_launch_options
from mmalign.types import InputError

TRAIN = ("train", "mapo")


def test_options_of_the_launcher_are_taken_out() -> None:
    line = ["train", "mapo", "--seed", "1", "--num_processes", "8", "--accelerate_config=ddp"]
    options, rest = take_launch_options(TRAIN, line)
    assert options == {"num_processes": "8", "accelerate_config": "ddp"}
    assert rest == ["train", "mapo", "--seed", "1"]
    assert take_launch_options(TRAIN, rest) == (None, rest)


@pytest.mark.parametrize(
    ("words", "line", "message"),
    [
        (TRAIN, ["--num_processes", "2"], "needs --accelerate_config"),
        (TRAIN, ["--accelerate_config"], "its value is missing"),
        (("generate",), ["--accelerate_config=ddp"], "mmalign generate runs in one process"),
        (("pairs", "label"), ["--accelerate_config=ddp"], "runs in one process"),
    ],
)
def test_options_that_say_nothing_are_refused(
    words: tuple[str, ...], line: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        take_launch_options(words, line)


def test_packaged_configurations_are_found() -> None:
    kinds = {"ddp": "MULTI_GPU", "deepspeed_zero3": "DEEPSPEED", "fsdp2": "FSDP"}
    for name, kind in kinds.items():
        settings = yaml.safe_load(config_file(name).read_text())
        assert settings["distributed_type"] == kind
    with pytest.raises(InputError, match="packaged ones are ddp, deepspeed_zero3, fsdp2"):
        config_file("dpp")


def test_what_all_processes_refuse_is_said_once() -> None:
    command = [sys.executable, "-m", "mmalign", "train", "mapo", "--pairs.path", "nowhere"]
    command += ["--accelerate_config", "ddp", "--num_processes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 2
    assert done.stderr == "error: pairs.path: no such file or folder: nowhere\n"
    assert done.stdout == ""


def test_fsdp2_of_an_image_generator_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    command = [sys.executable, "-m", "mmalign", "train", "draft", "--accelerate_config", "fsdp2"]
    command += ["--num_processes", "2", "--device=cpu", f"--output_dir={tmp_path / 'run'}"]
    command += [f"--prompts={tmp_path / 'prompts.txt'}", '--rewards=[{"name": "brightness"}]']
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 2
    refused = "fsdp2 is for vision-language models; use ddp or deepspeed_zero3"
    assert done.stderr == f"error: accelerate_config: {refused}\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(is_installed("deepspeed"), reason="for those who have not got it")
def test_deepspeed_that_is_not_installed_is_one_line() -> None:
    command = [sys.executable, "-m", "mmalign", "train", "mapo", "--accelerate_config"]
    command += ["deepspeed_zero3", "--num_processes", "2", "--pairs.path", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: accelerate_config: DeepSpeed is not installed; pip install")
