"""`mmalign export` from its configuration to the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from mmalign.adapters import load_adapter
from mmalign.config import ExportConfig, LoraConfig, ModelConfig
from mmalign.lora import attach_lora, save_lora
from mmalign.pipelines.export import run
from mmalign.types import InputError


@pytest.fixture
def lora(tiny_sd: Path, tmp_path: Path) -> Path:
    adapter = load_adapter(ModelConfig(model=str(tiny_sd)), device="cpu")
    attach_lora(adapter.denoiser, LoraConfig(rank=2, alpha=3), seed=0)
    with torch.no_grad():
        for name, parameter in adapter.denoiser.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    save_lora(adapter.denoiser, tmp_path / "lora")
    return tmp_path / "lora"


def export(model: Path, lora: Path | None, output: Path, **options: Any) -> None:
    adapter = None if lora is None else str(lora)
    run(ExportConfig(model=str(model), adapter=adapter, output=str(output), **options))


def test_kohya(tiny_sd: Path, lora: Path, tmp_path: Path) -> None:
    export(tiny_sd, lora, tmp_path / "for.a1111")
    tensors = load_file(tmp_path / "for.a1111.safetensors")
    assert {float(value) for name, value in tensors.items() if name.endswith(".alpha")} == {3.0}


def test_merged(tiny_sd: Path, lora: Path, tmp_path: Path) -> None:
    export(tiny_sd, lora, tmp_path / "merged", format="merged", adapter_scale=2.0)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    weights = load_file(lora / "pytorch_lora_weights.safetensors")
    update = weights[f"unet.{name}.lora_B.weight"] @ weights[f"unet.{name}.lora_A.weight"]
    models = [
        StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True).unet
        for folder in (tiny_sd, tmp_path / "merged")
    ]
    before, after = (model.get_parameter(f"{name}.weight") for model in models)
    torch.testing.assert_close(after - before, 2.0 * 3 / 2 * update, rtol=1e-4, atol=1e-6)


def test_bad_options(tiny_sd: Path, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="adapter is missing"):
        export(tiny_sd, None, tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists; choose another"):
        export(tiny_sd, lora, tmp_path / "out", format="merged")
    with pytest.raises(InputError, match="no such adapter"):
        export(tiny_sd, tmp_path / "none", tmp_path / "new")
