"""LoRA files as strangers write them: what does not fit is refused, and nothing in them is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from loras import LORAS, load, sample, trained
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmalign.lora import (
    WEIGHTS_NAME,
    read_lora,
    save_lora,
)
from mmalign.types import InputError


def test_missing_and_pickled_files(tiny_sd: Path, tmp_path: Path) -> None:
    def fails(path: Path, match: str) -> None:
        with pytest.raises(InputError, match=match):
            load(tiny_sd, adapter=str(path))

    fails(tmp_path / "none", "no such adapter")
    fails(tmp_path, f"has no {WEIGHTS_NAME}")
    (tmp_path / "lora.bin").write_bytes(b"pickle")
    fails(tmp_path, "only pickled weights")
    fails(tmp_path / "lora.bin", "pickled weights are never loaded")
    (tmp_path / "a.safetensors").write_bytes(b"broken")
    fails(tmp_path, "cannot be read")
    (tmp_path / "b.safetensors").touch()
    fails(tmp_path, "has 2 .safetensors files")
    save_file({"weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    fails(tmp_path / "a.safetensors", "is not a LoRA")


def test_lora_of_another_model(tiny_sd: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    save_lora(trained(tiny_sdxl, LORAS["attention"]).denoiser, tmp_path)
    with pytest.raises(InputError, match=r"another model|does not fit the model") as caught:
        load(tiny_sd, adapter=str(tmp_path))
    assert "\n" not in str(caught.value)


def damage(folder: Path, change: dict[str, torch.Tensor | None], **settings: Any) -> None:
    file = folder / WEIGHTS_NAME
    tensors = {**load_file(file), **change}
    with safe_open(file, framework="pt") as content:
        metadata = content.metadata()
    told = json.loads(metadata["lora_adapter_metadata"])
    told |= {f"unet.{name}": value for name, value in settings.items()}
    metadata["lora_adapter_metadata"] = json.dumps(told)
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, file, metadata=metadata)


@pytest.mark.parametrize("case", ["shape", "extra layer", "missing half", "other component"])
def test_tensors_that_do_not_fit(tiny_sd: Path, tmp_path: Path, case: str) -> None:
    save_lora(trained(tiny_sd, LORAS["attention"]).denoiser, tmp_path)
    down = next(name for name in load_file(tmp_path / WEIGHTS_NAME) if "lora_A" in name)
    up = down.replace("lora_A", "lora_B")
    changes: dict[str, dict[str, torch.Tensor | None]] = {
        "shape": {down: torch.zeros(4, 99)},
        "extra layer": {"unet.nothing.lora_A.weight": torch.zeros(4, 8)},
        "missing half": {up: None},
        "other component": {"transformer.x.lora_A.weight": torch.zeros(4, 8)},
    }
    damage(tmp_path, changes[case])
    with pytest.raises(InputError, match=str(tmp_path)) as caught:
        load(tiny_sd, adapter=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_settings_of_a_file_cannot_import_or_name_anything(tiny_sd: Path, tmp_path: Path) -> None:
    adapter = trained(tiny_sd, LORAS["alpha is not rank"])
    images = sample(adapter)
    save_lora(adapter.denoiser, tmp_path)
    damage(
        tmp_path,
        {},
        megatron_config={"a": 1},
        megatron_core="this",
        init_lora_weights="pissa",
        target_modules="(a+)+$",
    )
    assert not any("megatron" in name for name in read_lora(tmp_path).settings)
    assert (sample(load(tiny_sd, adapter=str(tmp_path))) - images).abs().max() == 0
    damage(tmp_path, {}, lora_alpha="7")
    with pytest.raises(InputError, match="lora_alpha is '7'"):
        load(tiny_sd, adapter=str(tmp_path))
