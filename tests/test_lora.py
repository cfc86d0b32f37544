"""LoRA training weights: how they begin, what is saved of them, and that plain diffusers agrees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    StableDiffusionPipeline,
)
from loras import LORAS, PIPELINES, load, plain_sample, sample, trained
from safetensors import safe_open
from safetensors.torch import load_file

from mmalign.config import (
    LoraConfig,
    ReferenceConfig,
)
from mmalign.lora import (
    WEIGHTS_NAME,
    attach_lora,
    fold_lora,
    save_lora,
    scratch_folder,
)
from mmalign.reference import make_reference
from mmalign.types import InputError


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_saved_lora_is_exact_in_plain_diffusers(
    image_family: str, image_model: Path, lora: LoraConfig, tmp_path: Path
) -> None:
    adapter = trained(image_model, lora)
    images, base = sample(adapter), sample(load(image_model))
    assert (images - base).abs().max() > 0.02
    path = save_lora(adapter.denoiser, tmp_path / "adapter")
    assert path == tmp_path / "adapter" / WEIGHTS_NAME
    assert [file.name for file in path.parent.iterdir()] == [WEIGHTS_NAME]
    pipeline = PIPELINES[image_family].from_pretrained(image_model, use_safetensors=True)
    pipeline.load_lora_weights(tmp_path / "adapter")
    assert (plain_sample(pipeline) - images).abs().max() == 0
    assert (sample(load(image_model, adapter=str(path.parent))) - images).abs().max() == 0


def test_adapter_scale(image_model: Path, tmp_path: Path) -> None:
    adapter = trained(image_model, LORAS["alpha is not rank"])
    save_lora(adapter.denoiser, tmp_path)
    off = load(image_model, adapter=str(tmp_path), adapter_scale=0.0)
    assert torch.equal(sample(off), sample(load(image_model)))
    half = load(image_model, adapter=str(tmp_path / WEIGHTS_NAME), adapter_scale=0.5)
    with torch.no_grad():
        for name, parameter in adapter.denoiser.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.5)
    torch.testing.assert_close(sample(half), sample(adapter), rtol=0, atol=1e-5)


def test_a_lora_loaded_for_training_becomes_part_of_the_model(
    image_model: Path, tmp_path: Path
) -> None:
    save_lora(trained(image_model, LORAS["attention"]).denoiser, tmp_path)
    images = sample(load(image_model, adapter=str(tmp_path)))
    adapter = load(image_model, adapter=str(tmp_path), for_training=True)
    assert not any("lora" in name for name, _ in adapter.denoiser.named_parameters())
    attach_lora(adapter.denoiser, LORAS["attention"], seed=1)
    torch.testing.assert_close(sample(adapter), images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_a_lora_goes_on_from_a_file(image_model: Path, lora: LoraConfig, tmp_path: Path) -> None:
    before = trained(image_model, lora)
    save_lora(before.denoiser, tmp_path)
    adapter = load(image_model)
    attach_lora(adapter.denoiser, replace(lora, init_from=str(tmp_path)), seed=5)
    assert torch.equal(sample(adapter), sample(before))
    reference = make_reference(adapter, lora, ReferenceConfig())
    with reference.active():
        assert torch.equal(sample(adapter), sample(load(image_model)))
    assert all("lora" in n for n, p in adapter.denoiser.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "changed", [{"rank": 3}, {"alpha": 4.0}, {"targets": ["to_q"]}], ids=lambda change: str(change)
)
def test_a_lora_of_another_shape_is_not_gone_on_from(
    tiny_sd: Path, changed: dict[str, Any], tmp_path: Path
) -> None:
    lora = LoraConfig(rank=2)
    save_lora(trained(tiny_sd, lora).denoiser, tmp_path)
    config = replace(lora, init_from=str(tmp_path), **changed)
    with pytest.raises(InputError, match=r"lora\.init_from: .* has another rank, alpha or other"):
        attach_lora(load(tiny_sd).denoiser, config, seed=0)


def test_initialization_is_keyed_by_the_seed(tiny_sd: Path) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        adapter = load(tiny_sd)
        torch.rand(seed + 1)  # moves the global generator
        attach_lora(adapter.denoiser, LoraConfig(rank=4), seed)
        return {n: p for n, p in adapter.denoiser.named_parameters() if p.requires_grad}

    first, again, other = weights(0), weights(0), weights(1)
    assert all("lora" in name for name in first)
    assert all(torch.equal(first[name], again[name]) for name in first)
    downs = [name for name in first if "lora_A" in name]
    assert all(not torch.equal(first[name], other[name]) for name in downs)
    assert all(first[name].abs().max() == 0 for name in first if "lora_B" in name)
    drawn = torch.cat([first[name].flatten() for name in downs])
    assert 0.2 < drawn.std() < 0.3  # 1 / rank


def test_a_fresh_lora_changes_nothing(tiny_sd: Path) -> None:
    adapter, base = load(tiny_sd), load(tiny_sd)
    attach_lora(adapter.denoiser, LORAS["alpha is not rank"], seed=0)
    assert torch.equal(sample(adapter), sample(base))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lora_is_float32_above_half_precision_weights(
    tiny_sd: Path, dtype: str, tmp_path: Path
) -> None:
    adapter = trained(tiny_sd, LORAS["alpha is not rank"], dtype=dtype)
    dtypes = {p.requires_grad: p.dtype for p in adapter.denoiser.parameters()}
    assert dtypes == {False: getattr(torch, dtype), True: torch.float32}
    condition = adapter.encode_condition(["x"], height=16, width=16)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    adapter.predict(latents, torch.tensor([9]), condition).float().square().sum().backward()
    gradients = [p.grad for p in adapter.denoiser.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    save_lora(adapter.denoiser, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS_NAME).values()} == {torch.float32}
    loaded = sample(load(tiny_sd, dtype=dtype, adapter=str(tmp_path)))
    torch.testing.assert_close(loaded, sample(adapter), rtol=0, atol=0.05)
    pipeline = StableDiffusionPipeline.from_pretrained(
        tiny_sd, use_safetensors=True, dtype=getattr(torch, dtype)
    )
    pipeline.load_lora_weights(tmp_path)
    assert (plain_sample(pipeline) - loaded).abs().max() == 0


def test_what_a_killed_save_has_left_goes(tmp_path: Path) -> None:
    (tmp_path / ".lora-killed").mkdir()
    (tmp_path / ".lora-killed" / "half").touch()
    (tmp_path / "other").touch()
    with scratch_folder(tmp_path) as scratch:
        assert sorted(tmp_path.iterdir()) == sorted([scratch, tmp_path / "other"])
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_channels_last_lora_can_be_saved(tiny_sd: Path, tmp_path: Path) -> None:
    adapter = trained(tiny_sd, LORAS["attention and convolutions"])
    adapter.denoiser.to(memory_format=torch.channels_last)
    save_lora(adapter.denoiser, tmp_path)
    loaded = sample(load(tiny_sd, adapter=str(tmp_path)))
    torch.testing.assert_close(loaded, sample(adapter), rtol=0, atol=1e-5)


def test_files_are_reproducible(tiny_sd: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_lora(trained(tiny_sd, LORAS["attention"]).denoiser, tmp_path / name)
    headers = []
    for name in ("a", "b"):
        with safe_open(tmp_path / name / WEIGHTS_NAME, framework="pt") as content:
            headers.append(content.metadata())
    assert headers[0] == headers[1]
    first, second = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("a", "b"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("lora", "match"),
    [
        (
            LoraConfig(targets=["to_q", "no_such"]),
            r"'no_such' matches no layer; for example: .*to_q",
        ),
        (LoraConfig(targets=["attn1"]), "'attn1' matches no layer"),
        (LoraConfig(targets=[]), "none given"),
        (LoraConfig(rank=0), "rank and alpha must be positive"),
        (LoraConfig(alpha=-1), "rank and alpha must be positive"),
    ],
)
def test_unusable_options(tiny_sd: Path, lora: LoraConfig, match: str) -> None:
    with pytest.raises(InputError, match=match):
        attach_lora(load(tiny_sd).denoiser, lora, seed=0)


def test_folding_removes_every_trace(tiny_sd: Path) -> None:
    adapter = trained(tiny_sd, LORAS["attention and convolutions"])
    images, names = sample(adapter), set(load(tiny_sd).denoiser.state_dict())
    fold_lora(adapter.denoiser)
    assert set(adapter.denoiser.state_dict()) == names
    torch.testing.assert_close(sample(adapter), images, rtol=0, atol=1e-5)
