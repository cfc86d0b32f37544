"""LoRAs exported for other programs and merged into their model."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from diffusers import (
    StableDiffusionPipeline,
)
from loras import LORAS, PIPELINES, load, plain_sample, sample, trained
from safetensors.torch import load_file

from mmalign.lora import (
    save_lora,
)
from mmalign.lora_export import export_kohya, export_merged
from mmalign.types import InputError


@pytest.mark.parametrize("name", ["attention", "alpha is not rank"])
def test_kohya_export_keeps_convolutions_and_alpha(
    image_family: str, image_model: Path, name: str, tmp_path: Path
) -> None:
    lora = LORAS[name]
    adapter = trained(image_model, lora)
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
    pipeline = PIPELINES[image_family].from_pretrained(image_model, use_safetensors=True)
    pipeline.load_lora_weights(file)
    torch.testing.assert_close(plain_sample(pipeline), images, rtol=0, atol=1e-6)
    assert (sample(load(image_model, adapter=str(file))) - images).abs().max() <= 1e-6


def test_merged_export_equals_the_adapter(
    image_family: str, image_model: Path, tmp_path: Path
) -> None:
    adapter = trained(image_model, LORAS["alpha is not rank"])
    images = sample(adapter)
    export_merged(adapter, tmp_path / "merged")
    pipeline = PIPELINES[image_family].from_pretrained(tmp_path / "merged", use_safetensors=True)
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
    weaker = load(tiny_sd, adapter=str(tmp_path), adapter_scale=0.5, for_training=True)
    assert weaker.fingerprint != adapter.fingerprint
    export_merged(adapter, tmp_path / "merged")
    torch.testing.assert_close(sample(load(tmp_path / "merged")), expected, rtol=0, atol=1e-5)


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
