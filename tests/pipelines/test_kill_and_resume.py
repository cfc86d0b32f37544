"""The real command, killed twice and resumed, ends bit for bit where an undisturbed run ends."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmalign.checkpoint import latest_checkpoint
from mmalign.cli import main
from mmalign.config import DiffusionDpoConfig, dump_config
from mmalign.data.writers import write_pairs
from mmalign.options import parse_options
from mmalign.types import ImageRef, PreferencePair

STEPS = 12


@pytest.fixture
def command(tiny_sd: Path, tmp_path: Path) -> list[str]:
    def picture(color: str) -> ImageRef:
        buffer = BytesIO()
        Image.new("RGB", (16, 16), color).save(buffer, "PNG")
        return ImageRef(buffer.getvalue(), color)

    colors = ["red", "green", "blue", "white", "black"]
    rows = [
        PreferencePair(
            pair_id=color, prompt="a red", chosen=picture(color), rejected=picture(other)
        )
        for color, other in zip(colors, [*colors[1:], "gray"], strict=True)
    ]
    write_pairs(rows, tmp_path / "pairs", "imagefolder")
    return [
        *(sys.executable, "-m", "mmalign", "train", "diffusion-dpo", "--device=cpu"),
        *(f"--model={tiny_sd}", f"--pairs.path={tmp_path / 'pairs'}", "--pairs.resolution=16"),
        *(f"--max_steps={STEPS}", "--save_steps=2", "--per_device_train_batch_size=2"),
        *("--learning_rate=0.01", "--resume_from_checkpoint=latest", "--offline"),
    ]


def start(command: list[str], output: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*command, f"--output_dir={output}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as this process, so that bits agree
    )


def lines(output: Path) -> int:
    log = output / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def kill_at(process: subprocess.Popen[bytes], output: Path, line: int, sign: int) -> int:
    while process.poll() is None and lines(output) < line:
        time.sleep(0.005)
    process.send_signal(sign)
    process.communicate(timeout=120)
    return process.returncode


def finish(process: subprocess.Popen[bytes]) -> None:
    text = process.communicate(timeout=240)[0]
    assert process.returncode == 0, text.decode()


def test_killed_runs_end_where_undisturbed_ones_do(command: list[str], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finish(start(command, whole))
    assert kill_at(start(command, parts), parts, 3, signal.SIGKILL) == -signal.SIGKILL
    assert kill_at(start(command, parts), parts, 7, signal.SIGTERM) == 143
    assert 0 < lines(parts) < STEPS
    finish(start(command, parts))
    assert_same_bits(whole, parts)


def assert_same_bits(whole: Path, parts: Path) -> None:
    assert (whole / "metrics.jsonl").read_bytes() == (parts / "metrics.jsonl").read_bytes()
    first, second = (
        load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")
        for folder in (whole, parts)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(value.abs().max() > 0 for key, value in first.items() if "lora_B" in key)


ONLINE = {
    "d3po": ["--clamp=none"],
    "tailorpo": ["--train_steps=2", "--guidance_step_size=0.1"],
    "draft": ["--num_lv_samples=1", "--kl_weight=0.1"],
    "rocm": [],
}
ONLINE_STEPS = 9


@pytest.fixture(scope="module")
def killed(
    tiny_sd: Path, tiny_lcm: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[list[str], Path, Future[str]]]]:
    """Kill the command of each online method at a random moment of its training."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "prompts.txt").write_text("red\na red\nred red\n")

    def kill(command: list[str], output: Path) -> str:
        line, delay = random.randint(3, 5), random.uniform(0, 0.1)
        process = start([sys.executable, "-m", "mmalign", *command], output)
        while process.poll() is None and lines(output) < line:
            time.sleep(0.005)
        time.sleep(delay)
        process.kill()
        text = process.communicate(timeout=120)[0].decode()
        assert process.returncode == -signal.SIGKILL, text
        return f"{delay:.3f} s after line {line}, at line {lines(output)}"

    found = {}
    with ThreadPoolExecutor(max_workers=2) as pool:
        for method, more in ONLINE.items():
            command = [
                *("train", method, f"--model={tiny_lcm if method == 'rocm' else tiny_sd}"),
                *("--device=cpu", "--offline", f"--prompts={folder / 'prompts.txt'}"),
                *('--rewards=[{"name": "brightness"}]', "--sampling.num_inference_steps=3"),
                *("--sampling.guidance_scale=2", f"--max_steps={ONLINE_STEPS}", "--save_steps=2"),
                *("--per_device_train_batch_size=2", "--learning_rate=0.01", "--lora.rank=2"),
                *("--resume_from_checkpoint=latest", *more),
            ]
            output = folder / method
            found[method] = (command, output, pool.submit(kill, command, output))
        yield found


@pytest.mark.parametrize("method", ONLINE)
def test_killed_online_runs_end_where_undisturbed_ones_do(
    method: str, killed: dict[str, tuple[list[str], Path, Future[str]]], tmp_path: Path
) -> None:
    command, parts, moment = killed[method]
    assert main([*command, f"--output_dir={tmp_path}"]) == 0
    sys.stderr.write(f"killed {moment.result()}\n")
    assert 0 < lines(parts) < ONLINE_STEPS, moment.result()
    assert not (parts / "adapter").exists()
    assert latest_checkpoint(parts / "checkpoints") is not None
    assert main([*command, f"--output_dir={parts}"]) == 0
    assert_same_bits(tmp_path, parts)


def test_written_configuration_reads_back(tmp_path: Path) -> None:
    config = DiffusionDpoConfig(beta=17.0, model="somewhere", max_steps=3)
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert parse_options(DiffusionDpoConfig, [f"--config={file}"], command="train") == config
