"""LoRA files, held against plain diffusers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import (
    LatentConsistencyModelPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmalign.adapters import DiffusersAdapter, load_adapter
from mmalign.config import (
    ATTENTION_TARGETS,
    LoraConfig,
    ModelConfig,
    ReferenceConfig,
    SamplingConfig,
)
from mmalign.lora import (
    WEIGHTS_NAME,
    attach_lora,
    fold_lora,
    read_lora,
    save_lora,
    scratch_folder,
)
from mmalign.lora_export import export_kohya, export_merged
from mmalign.reference import make_reference
from mmalign.types import InputError

CONVOLUTIONS = ["conv1", "conv2", "conv", "conv_shortcut", "proj_in", "time_emb_proj"]
LORAS = {
    "attention": LoraConfig(rank=4),
    "attention and convolutions": LoraConfig(rank=4, targets=ATTENTION_TARGETS + CONVOLUTIONS),
    "alpha is not rank": LoraConfig(rank=2, alpha=5, targets=ATTENTION_TARGETS + CONVOLUTIONS),
}
PIPELINES = {
    "tiny_sd": StableDiffusionPipeline,
    "tiny_sdxl": StableDiffusionXLPipeline,
    "tiny_lcm": LatentConsistencyModelPipeline,
}
PROMPTS, SEEDS = ["red cat", "a dog"], [1, 2]
SAMPLING = SamplingConfig(num_inference_steps=2, guidance_scale=3.0)


@pytest.fixture(params=list(PIPELINES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(family: str, request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(family))


def load(folder: Path, **options: Any) -> DiffusersAdapter:
    for_training = options.pop("for_training", False)
    config = ModelConfig(model=str(folder), **options)
    return load_adapter(config, device="cpu", for_training=for_training)


def trained(folder: Path, lora: LoraConfig, **options: Any) -> DiffusersAdapter:
    """Load a model with a LoRA that changes its images visibly."""
    adapter = load(folder, **options)
    attach_lora(adapter.denoiser, lora, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapter.denoiser.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapter


def sample(adapter: DiffusersAdapter) -> torch.Tensor:
    return adapter.sample(PROMPTS, SEEDS, SAMPLING)


def plain_sample(pipeline: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    images: torch.Tensor = pipeline(
        PROMPTS,
        generator=generators,
        num_inference_steps=SAMPLING.num_inference_steps,
        guidance_scale=SAMPLING.guidance_scale,
        output_type="pt",
    ).images
    return images


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_saved_lora_is_exact_in_plain_diffusers(
    family: str, model: Path, lora: LoraConfig, tmp_path: Path
) -> None:
    adapter = trained(model, lora)
    images, base = sample(adapter), sample(load(model))
    assert (images - base).abs().max() > 0.02
    path = save_lora(adapter.denoiser, tmp_path / "adapter")
    assert path == tmp_path / "adapter" / WEIGHTS_NAME
    assert [file.name for file in path.parent.iterdir()] == [WEIGHTS_NAME]
    pipeline = PIPELINES[family].from_pretrained(model, use_safetensors=True)
    pipeline.load_lora_weights(tmp_path / "adapter")
    assert (plain_sample(pipeline) - images).abs().max() == 0
    assert (sample(load(model, adapter=str(path.parent))) - images).abs().max() == 0


def test_adapter_scale(model: Path, tmp_path: Path) -> None:
    adapter = trained(model, LORAS["alpha is not rank"])
    save_lora(adapter.denoiser, tmp_path)
    off = load(model, adapter=str(tmp_path), adapter_scale=0.0)
    assert torch.equal(sample(off), sample(load(model)))
    half = load(model, adapter=str(tmp_path / WEIGHTS_NAME), adapter_scale=0.5)
    with torch.no_grad():
        for name, parameter in adapter.denoiser.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.5)
    torch.testing.assert_close(sample(half), sample(adapter), rtol=0, atol=1e-5)


def test_a_lora_loaded_for_training_becomes_part_of_the_model(model: Path, tmp_path: Path) -> None:
    save_lora(trained(model, LORAS["attention"]).denoiser, tmp_path)
    images = sample(load(model, adapter=str(tmp_path)))
    adapter = load(model, adapter=str(tmp_path), for_training=True)
    assert not any("lora" in name for name, _ in adapter.denoiser.named_parameters())
    attach_lora(adapter.denoiser, LORAS["attention"], seed=1)
    torch.testing.assert_close(sample(adapter), images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_a_lora_goes_on_from_a_file(model: Path, lora: LoraConfig, tmp_path: Path) -> None:
    before = trained(model, lora)
    save_lora(before.denoiser, tmp_path)
    adapter = load(model)
    attach_lora(adapter.denoiser, replace(lora, init_from=str(tmp_path)), seed=5)
    assert torch.equal(sample(adapter), sample(before))
    reference = make_reference(adapter, lora, ReferenceConfig())
    with reference.active():
        assert torch.equal(sample(adapter), sample(load(model)))
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


@pytest.mark.parametrize("name", ["attention", "alpha is not rank"])
def test_kohya_export_keeps_convolutions_and_alpha(
    family: str, model: Path, name: str, tmp_path: Path
) -> None:
    lora = LORAS[name]
    adapter = trained(model, lora)
    images = sample(adapter)
    save_lora(adapter.denoiser, tmp_path / "adapter")
    file = export_kohya(tmp_path / "adapter", tmp_path / "out" / "kohya.safetensors")
    tensors = load_file(file)
    layers = {name.split(".")[0] for name in tensors}
    assert len(tensors) == 3 * len(layers)
    assert all(name.startswith("lora_unet_") for name in layers)
    assert ("lora_unet_mid_block_resnets_0_conv1" in layers) == ("conv1" in lora.targets)
    alphas = {float(tensors[f"{name}.alpha"]) for name in layers}
    assert alphas == {float(lora.alpha or lora.rank)}
    pipeline = PIPELINES[family].from_pretrained(model, use_safetensors=True)
    pipeline.load_lora_weights(file)
    torch.testing.assert_close(plain_sample(pipeline), images, rtol=0, atol=1e-6)
    assert (sample(load(model, adapter=str(file))) - images).abs().max() <= 1e-6


def test_merged_export_equals_the_adapter(family: str, model: Path, tmp_path: Path) -> None:
    adapter = trained(model, LORAS["alpha is not rank"])
    images = sample(adapter)
    export_merged(adapter, tmp_path / "merged")
    pipeline = PIPELINES[family].from_pretrained(tmp_path / "merged", use_safetensors=True)
    assert not any("lora" in name for name in pipeline.unet.state_dict())
    torch.testing.assert_close(plain_sample(pipeline), images, rtol=0, atol=1e-5)
    assert torch.equal(sample(adapter), images)


def test_merged_export_uses_scale_and_dtype(tiny_sd: Path, tmp_path: Path) -> None:
    save_lora(trained(tiny_sd, LORAS["attention"]).denoiser, tmp_path / "adapter")
    options = {"adapter": str(tmp_path / "adapter"), "adapter_scale": 0.5}
    images = sample(load(tiny_sd, **options))
    export_merged(load(tiny_sd, **options), tmp_path / "full")
    torch.testing.assert_close(sample(load(tmp_path / "full")), images, rtol=0, atol=1e-5)
    export_merged(load(tiny_sd, dtype="float16", **options), tmp_path / "half")
    (file,) = (tmp_path / "half" / "unet").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}


def test_text_encoder_lora_is_loaded_kept_and_merged(tiny_sd: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, use_safetensors=True)
    settings = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "fc1"])
    settings.init_lora_weights = False
    torch.manual_seed(0)
    pipeline.text_encoder.add_adapter(settings, adapter_name="default")
    tensors = peft.utils.get_peft_model_state_dict(pipeline.text_encoder, adapter_name="default")
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        text_encoder_lora_layers=tensors,
        text_encoder_lora_adapter_metadata=settings.to_dict(),
    )
    plain = StableDiffusionPipeline.from_pretrained(tiny_sd, use_safetensors=True)
    plain.load_lora_weights(tmp_path)
    expected = plain_sample(plain)
    adapter = load(tiny_sd, adapter=str(tmp_path), for_training=True)
    assert (sample(adapter) - sample(load(tiny_sd))).abs().max() > 1e-3
    assert (sample(adapter) - expected).abs().max() == 0
    adapter.release_encoders()
    assert (sample(adapter) - expected).abs().max() == 0
    assert adapter.fingerprint != load(tiny_sd).fingerprint
    export_merged(adapter, tmp_path / "merged")
    torch.testing.assert_close(sample(load(tmp_path / "merged")), expected, rtol=0, atol=1e-5)


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


def test_folding_removes_every_trace(tiny_sd: Path) -> None:
    adapter = trained(tiny_sd, LORAS["attention and convolutions"])
    images, names = sample(adapter), set(load(tiny_sd).denoiser.state_dict())
    fold_lora(adapter.denoiser)
    assert set(adapter.denoiser.state_dict()) == names
    torch.testing.assert_close(sample(adapter), images, rtol=0, atol=1e-5)


def test_unwritable_targets(tiny_sd: Path, tmp_path: Path) -> None:
    adapter = trained(tiny_sd, LORAS["attention"])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        save_lora(adapter.denoiser, tmp_path / "file")
    save_lora(adapter.denoiser, tmp_path / "adapter")
    with pytest.raises(InputError, match=r"^cannot write .*(Not a directory|File exists)$"):
        export_kohya(tmp_path / "adapter", tmp_path / "file" / "x.safetensors")
    kohya = export_kohya(tmp_path / "adapter", tmp_path / "kohya.safetensors")
    with pytest.raises(InputError, match="other keys than PEFT's"):
        export_kohya(kohya, tmp_path / "again.safetensors")
