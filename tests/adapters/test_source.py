"""Checkpoints that cannot be used: one clear line each, and nothing of theirs runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.adapters import load_adapter
from mmalign.config import LoraConfig, ModelConfig, OfflineConfig, SamplingConfig
from mmalign.types import InputError


def fails(config: ModelConfig, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        load_adapter(config, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.fixture
def copied(tiny_sd: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sd, tmp_path / "model"))


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_missing_folder(tmp_path: Path) -> None:
    fails(ModelConfig(model=str(tmp_path / "none")), "no such folder")


def test_missing_package() -> None:
    fails(ModelConfig(model="pkg://no_such_package/models"), "no_such_package")


def test_single_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    fails(ModelConfig(model=str(tmp_path / "model.safetensors")), "is a file")


def test_folder_without_index(tmp_path: Path) -> None:
    fails(ModelConfig(model=str(tmp_path)), "has no model_index.json")


def test_broken_index(copied: Path) -> None:
    (copied / "model_index.json").write_text("{")
    fails(ModelConfig(model=str(copied)), "model_index.json: cannot be read")
    (copied / "model_index.json").write_text("[1]")
    fails(ModelConfig(model=str(copied)), "is not a JSON object")


def test_unknown_pipeline_class(copied: Path) -> None:
    edit(copied / "model_index.json", lambda index: index.update(_class_name="FluxPipeline"))
    fails(ModelConfig(model=str(copied)), "unknown pipeline class 'FluxPipeline'; supported are")


@pytest.mark.parametrize("component", ["unet", "scheduler", "safety_checker", "extra"])
def test_foreign_classes_are_not_imported(copied: Path, component: str) -> None:
    edit(copied / "model_index.json", lambda index: index.update({component: ["os", "system"]}))
    fails(ModelConfig(model=str(copied)), f"asks for os.system as {component}")


def test_missing_component(copied: Path) -> None:
    shutil.rmtree(copied / "vae")
    fails(ModelConfig(model=str(copied)), "has no folder vae")
    edit(copied / "model_index.json", lambda index: index.update(vae=[None, None]))
    fails(ModelConfig(model=str(copied)), "model_index.json has no vae")


def test_pickled_weights_are_refused(copied: Path) -> None:
    for file in (copied / "unet").glob("*.safetensors"):
        file.unlink()
    fails(ModelConfig(model=str(copied)), "unet has no .safetensors weights")
    (copied / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    fails(ModelConfig(model=str(copied)), "unet has only pickled weights")


def test_damaged_weights(copied: Path) -> None:
    (file,) = (copied / "unet").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    fails(ModelConfig(model=str(copied)), "cannot be loaded")


def test_missing_variant(tiny_sd: Path) -> None:
    fails(ModelConfig(model=str(tiny_sd), variant="fp16"), "cannot be loaded.*fp16")


def test_unsupported_prediction_type(copied: Path) -> None:
    file = copied / "scheduler" / "scheduler_config.json"
    edit(file, lambda config: config.update(prediction_type="sample"))
    fails(ModelConfig(model=str(copied)), "prediction_type 'sample' is not supported")


def test_wrong_family(tiny_sd: Path) -> None:
    fails(ModelConfig(model=str(tiny_sd), family="sdxl"), "family is sd, not sdxl")


def test_the_denoiser_decides_the_family(copied: Path, tiny_lcm: Path, tmp_path: Path) -> None:
    edit(copied / "unet" / "config.json", lambda config: config.update(time_cond_proj_dim=32))
    fails(ModelConfig(model=str(copied)), "needs LCMScheduler|cannot be loaded")
    other = Path(shutil.copytree(tiny_lcm, tmp_path / "lcm"))
    edit(
        other / "model_index.json",
        lambda index: index.update(_class_name="StableDiffusionPipeline"),
    )
    assert load_adapter(ModelConfig(model=str(other)), device="cpu").family == "lcm"
    edit(other / "unet" / "config.json", lambda config: config.update(time_cond_proj_dim=None))
    edit(
        other / "model_index.json",
        lambda index: index.update(_class_name="LatentConsistencyModelPipeline"),
    )
    fails(ModelConfig(model=str(other)), "no guidance embedding")


def test_offline_never_contacts_a_hub() -> None:
    fails(
        ModelConfig(model="someone/some-model", offline=True),
        "someone/some-model: neither a local folder nor found in the hub's local cache .offline",
    )


@pytest.mark.parametrize(
    ("offline", "where"), [(False, "on the hub"), (True, r"in the hub's .* \(HF_HUB_OFFLINE\)")]
)
def test_hub_failure_is_one_line(
    offline: bool, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def refuse(name: str, **options: Any) -> None:
        asked.update(options, name=name)
        raise OSError("no connection\nlong explanation")

    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", refuse)
    monkeypatch.setattr("mmalign.adapters._source.HF_HUB_OFFLINE", offline)
    fails(
        ModelConfig(model="someone/some-model", revision="main"),
        f"nor found {where}: no connection$",
    )
    assert asked == {
        "name": "someone/some-model",
        "revision": "main",
        "local_files_only": False,
        "subfolder": None,
    }


def test_full_fine_tuning_keeps_trained_weights_in_float32(tiny_sd: Path) -> None:
    config = OfflineConfig(model=str(tiny_sd), dtype="bfloat16", lora=LoraConfig(enabled=False))
    adapter: Any = load_adapter(config, device="cpu")
    assert adapter.denoiser.dtype == torch.float32
    assert adapter.pipeline.vae.dtype == torch.bfloat16
    images = adapter.sample(["x"], [0], SamplingConfig(num_inference_steps=2))
    assert images.isfinite().all()
    assert adapter.pipeline.unet is adapter.denoiser
    frozen: Any = load_adapter(config, device="cpu", for_training=False)
    assert frozen.denoiser.dtype == torch.bfloat16
