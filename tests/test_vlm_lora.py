"""LoRA files of vision-language models: what is written, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vlm_models import edited

from mmalign.adapters import load_vlm
from mmalign.config import VlmLoraConfig, VlmModelConfig
from mmalign.lora import ADAPTER_NAME
from mmalign.types import InputError
from mmalign.vlm_lora import attach_vlm_lora, load_vlm_lora, read_vlm_lora, save_vlm_lora


@pytest.fixture
def fresh(vlm: Callable[[str], Path]) -> Callable[[], Any]:
    return lambda: load_vlm(VlmModelConfig(model=str(vlm("llava")), offline=True), "cpu").model


@pytest.fixture
def saved(fresh: Callable[[], Any], tmp_path: Path) -> Path:
    model = fresh()
    attach_vlm_lora(model, VlmLoraConfig(rank=2, alpha=4), seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    return save_vlm_lora(model, tmp_path / "adapter", "some/model")


def test_only_the_language_model_is_trained(fresh: Callable[[], Any]) -> None:
    model = fresh()
    attach_vlm_lora(model, VlmLoraConfig(rank=2, targets=["q_proj"]), seed=0)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4
    assert all("language_model" in name and "q_proj.lora_" in name for name in trained)
    # The vision tower has layers of the same name.
    assert any("vision" in name and name.endswith("q_proj") for name, _ in model.named_modules())


def test_settings_are_those_of_peft(saved: Path) -> None:
    settings = json.loads((saved / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (2, 4, "LORA")
    assert settings["base_model_name_or_path"] == "some/model"
    tensors = load_file(saved / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.language_model.") for name in tensors)


def test_fingerprint_follows_alpha(vlm: Callable[[str], Path], saved: Path, tmp_path: Path) -> None:
    def fingerprint(adapter: Path) -> str:
        config = VlmModelConfig(model=str(vlm("llava")), adapter=str(adapter), offline=True)
        return load_vlm(config, "cpu").fingerprint

    stronger = edited(saved, tmp_path / "stronger", "adapter_config.json", lora_alpha=8)
    assert fingerprint(saved) == fingerprint(saved)
    assert fingerprint(stronger) != fingerprint(saved)


def test_training_goes_on_from_a_file(saved: Path, fresh: Callable[[], Any]) -> None:
    model = fresh()
    config = VlmLoraConfig(rank=2, alpha=4, init_from=str(saved))
    attach_vlm_lora(model, config, seed=2)
    values = {n: p for n, p in model.named_parameters() if p.requires_grad}
    file = read_vlm_lora(saved)
    for name, tensor in file.tensors.items():
        key = name.replace(".weight", f".{ADAPTER_NAME}.weight")
        assert torch.equal(values[key], tensor)
    other = VlmLoraConfig(rank=2, alpha=8, init_from=str(saved))
    with pytest.raises(InputError, match=r"lora\.init_from: .* has another rank, alpha"):
        attach_vlm_lora(fresh(), other, seed=2)


def test_folding_keeps_the_layers_plain(saved: Path, fresh: Callable[[], Any]) -> None:
    model, plain = fresh(), fresh()
    load_vlm_lora(model, saved, fold=True)
    assert model.state_dict().keys() == plain.state_dict().keys()
    attach_vlm_lora(model, VlmLoraConfig(rank=2), seed=0)  # so that a new one can be attached


def broken(saved: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(saved, folder)
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**content, **changes}))
    return folder


def test_unusable_files_are_one_line(saved: Path, fresh: Callable[[], Any], tmp_path: Path) -> None:
    cut = broken(saved, tmp_path / "cut")
    (cut / "adapter_model.safetensors").write_bytes(b"0" * 40)
    foreign = broken(saved, tmp_path / "foreign")
    tensors = load_file(foreign / "adapter_model.safetensors")
    renamed = {name.replace("layers.1", "layers.7"): t for name, t in tensors.items()}
    save_file(renamed, foreign / "adapter_model.safetensors")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_model.bin").write_bytes(b"")
    cases = {
        cut: "cannot be read",
        foreign: "for another model|does not fit the model",
        pickled: "only pickled weights",
        tmp_path / "nothing": "there is no adapter_model.safetensors",
        broken(saved, tmp_path / "type", peft_type="PREFIX_TUNING"): "not the settings of a LoRA",
        broken(saved, tmp_path / "rank", r=-1): "r is -1",
        broken(saved, tmp_path / "pattern", rank_pattern=3): "rank_pattern is 3",
    }
    for folder, problem in cases.items():
        with pytest.raises(InputError, match=problem) as caught:
            load_vlm_lora(fresh(), folder, fold=False)
        assert "\n" not in str(caught.value)
