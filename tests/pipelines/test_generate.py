"""`mmalign generate` from its configuration to the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.adapters import load_adapter
from mmalign.config import GenerateConfig, LoraConfig, ModelConfig, SamplingConfig
from mmalign.lora import attach_lora, save_lora
from mmalign.pipelines.generate import run
from mmalign.randomness import derive_seed
from mmalign.types import InputError

SAMPLING = SamplingConfig(num_inference_steps=2, batch_size=2, seed=5)


def generate(model: Path, output: Path, **options: Any) -> list[dict[str, Any]]:
    run(
        GenerateConfig(
            model=str(model), output=str(output), device="cpu", sampling=SAMPLING, **options
        )
    )
    lines = (output / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def pixels(folder: Path, row: dict[str, Any]) -> np.ndarray[Any, Any]:
    with Image.open(folder / row["file_name"]) as image:
        return np.asarray(image, dtype=np.float64) / 255


def test_images_and_metadata(tiny_sd: Path, tmp_path: Path) -> None:
    rows = generate(tiny_sd, tmp_path, prompt=["red cat", "a dög"], images_per_prompt=2)
    assert [row["file_name"] for row in rows] == [
        *("00000-00.png", "00000-01.png"),
        *("00001-00.png", "00001-01.png"),
    ]
    assert [row["prompt"] for row in rows] == ["red cat"] * 2 + ["a dög"] * 2
    assert [row["seed"] for row in rows] == [
        derive_seed(5, prompt, index) for prompt in ("red cat", "a dög") for index in (0, 1)
    ]
    adapter = load_adapter(ModelConfig(model=str(tiny_sd)), device="cpu")
    images = adapter.sample(
        [row["prompt"] for row in rows], [row["seed"] for row in rows], SAMPLING
    )
    for row, image in zip(rows, images, strict=True):
        expected = image.permute(1, 2, 0).numpy()
        assert np.abs(pixels(tmp_path, row) - expected).max() <= 0.5 / 255 + 1e-4


def test_images_do_not_depend_on_other_prompts(tiny_sd: Path, tmp_path: Path) -> None:
    alone = generate(tiny_sd, tmp_path / "a", prompt=["x"])
    (tmp_path / "prompts.txt").write_text("red\nx\nx\n")
    rows = generate(tiny_sd, tmp_path / "b", prompts=str(tmp_path / "prompts.txt"))
    assert alone[0]["seed"] == rows[1]["seed"] != rows[2]["seed"]
    same = np.abs(pixels(tmp_path / "a", alone[0]) - pixels(tmp_path / "b", rows[1])).max()
    assert same <= 1 / 255 + 1e-6


def test_adapter_is_used(tiny_sd: Path, tmp_path: Path) -> None:
    adapter = load_adapter(ModelConfig(model=str(tiny_sd)), device="cpu")
    attach_lora(adapter.denoiser, LoraConfig(rank=2), seed=0)
    with torch.no_grad():
        for name, parameter in adapter.denoiser.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1.0)
    save_lora(adapter.denoiser, tmp_path / "lora")
    (base,) = generate(tiny_sd, tmp_path / "a", prompt=["x"])
    (row,) = generate(tiny_sd, tmp_path / "b", prompt=["x"], adapter=str(tmp_path / "lora"))
    assert base["seed"] == row["seed"]
    assert np.abs(pixels(tmp_path / "a", base) - pixels(tmp_path / "b", row)).max() > 0.01


def test_earlier_images_are_not_overwritten(tiny_sd: Path, tmp_path: Path) -> None:
    generate(tiny_sd, tmp_path, prompt=["x"])
    with pytest.raises(InputError, match="already holds images"):
        generate(tiny_sd, tmp_path, prompt=["y"])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "either --prompts"),
        ({"prompt": ["x"], "prompts": "p.txt"}, "either --prompts"),
        ({"prompt": [" "]}, "an empty one"),
        ({"prompt": ["x"], "images_per_prompt": 0}, "images_per_prompt: must be at least 1"),
        ({"prompt": ["x"], "adapter": "missing"}, "missing: no such adapter"),
    ],
)
def test_bad_options(tiny_sd: Path, tmp_path: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        generate(tiny_sd, tmp_path / "images", **options)
    assert not (tmp_path / "images").exists()


def test_unwritable_output(tiny_sd: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written|cannot write"):
        generate(tiny_sd, tmp_path / "file" / "images", prompt=["x"])
