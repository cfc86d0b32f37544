"""What every family must do, held against plain diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    LatentConsistencyModelPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from mmalign.adapters import DiffusersAdapter, load_adapter
from mmalign.config import ModelConfig, SamplingConfig
from mmalign.types import ImageAdapter, InputError

PROMPTS = ["red cat", "a dog", "x"]
SEEDS = [11, 2**62, 3]
FAMILIES = ["tiny_sd", "tiny_sd_v", "tiny_sdxl", "tiny_lcm"]
PIPELINES = {
    "tiny_sd": StableDiffusionPipeline,
    "tiny_sd_v": StableDiffusionPipeline,
    "tiny_sdxl": StableDiffusionXLPipeline,
    "tiny_lcm": LatentConsistencyModelPipeline,
}


@pytest.fixture(params=FAMILIES)
def fixture_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(fixture_name: str, request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(fixture_name))


def load(folder: Path, **options: Any) -> DiffusersAdapter:
    return load_adapter(ModelConfig(model=str(folder), **options), device="cpu")


def plain(fixture_name: str, folder: Path) -> Any:
    pipeline = PIPELINES[fixture_name].from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_family_and_prediction_type(fixture_name: str, folder: Path) -> None:
    adapter: ImageAdapter = load(folder)
    assert adapter.family == {"tiny_sd_v": "sd"}.get(fixture_name, fixture_name[5:])
    expected = "v_prediction" if fixture_name == "tiny_sd_v" else "epsilon"
    assert adapter.prediction_type == expected
    assert not any(p.requires_grad for p in adapter.denoiser.parameters())


def test_sample_equals_plain_diffusers(fixture_name: str, folder: Path) -> None:
    sampling = SamplingConfig(
        num_inference_steps=3, guidance_scale=3.5, eta=0.0, height=24, width=16, batch_size=8
    )
    images = load(folder).sample(PROMPTS, SEEDS, sampling)
    expected = plain(fixture_name, folder)(
        PROMPTS,
        generator=generators(SEEDS),
        num_inference_steps=3,
        guidance_scale=3.5,
        height=24,
        width=16,
        output_type="pt",
    ).images
    assert images.shape == (3, 3, 24, 16)
    assert images.dtype == torch.float32
    assert (images - expected).abs().max() == 0


def test_each_image_has_its_own_seed_whatever_the_batch_size(folder: Path) -> None:
    adapter = load(folder)
    together = adapter.sample(PROMPTS, SEEDS, SamplingConfig(num_inference_steps=2))
    alone = adapter.sample(PROMPTS, SEEDS, SamplingConfig(num_inference_steps=2, batch_size=1))
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    other = adapter.sample(PROMPTS, [1, 2, 3], SamplingConfig(num_inference_steps=2))
    assert (other[0] - together[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl"])
def test_eta_is_passed_on(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    adapter = load(folder)
    noisy = adapter.sample(PROMPTS, SEEDS, SamplingConfig(num_inference_steps=3, eta=1.0))
    expected = plain(name, folder)(
        PROMPTS,
        generator=generators(SEEDS),
        num_inference_steps=3,
        guidance_scale=5.0,
        eta=1.0,
        output_type="pt",
    ).images
    assert (noisy - expected).abs().max() == 0
    calm = adapter.sample(PROMPTS, SEEDS, SamplingConfig(num_inference_steps=3))
    assert (noisy - calm).abs().max() > 1e-3


def test_predict_equals_the_denoiser_call_of_the_pipeline(fixture_name: str, folder: Path) -> None:
    """Runs the plain pipeline, and repeats each of its denoiser calls through `predict`."""
    pipeline, adapter, calls = plain(fixture_name, folder), load(folder), []
    pipeline.unet.register_forward_hook(
        lambda _, args, kwargs, output: calls.append((args, output[0])), with_kwargs=True
    )
    scale = 7.5 if fixture_name == "tiny_lcm" else 1.0
    options = {"num_inference_steps": 2, "guidance_scale": scale, "height": 24, "width": 32}
    pipeline(PROMPTS, generator=generators(SEEDS), output_type="latent", **options)
    condition = adapter.encode_condition(PROMPTS, height=24, width=32)
    guidance = torch.full((3,), scale) if fixture_name == "tiny_lcm" else None
    assert len(calls) == 2
    for (latents, timestep), expected in calls:
        timesteps = timestep.repeat(3)
        output = adapter.predict(latents, timesteps, condition, guidance_scale=guidance)
        assert (output - expected).abs().max() == 0


def test_condition_has_one_row_per_prompt(folder: Path) -> None:
    condition = load(folder).encode_condition(PROMPTS, height=16, width=16)
    assert all(len(rows) == 3 and not rows.requires_grad for rows in condition.values())
    assert (condition["prompt_embeds"][0] - condition["prompt_embeds"][1]).abs().max() > 1e-3


def test_add_noise_equals_the_scheduler(fixture_name: str, folder: Path) -> None:
    adapter = load(folder)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 500, 999])
    expected = plain(fixture_name, folder).scheduler.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(adapter.add_noise(latents, noise, timesteps), expected)
    assert adapter.alphas_cumprod.shape == (1000,)


def test_encode_images_returns_the_scaled_posterior(fixture_name: str, folder: Path) -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mean, std = load(folder).encode_images(images)
    vae = plain(fixture_name, folder).vae
    with torch.no_grad():
        posterior = vae.encode(images * 2 - 1).latent_dist
    torch.testing.assert_close(mean, posterior.mean * 0.2)
    torch.testing.assert_close(std, posterior.std * 0.2)


def test_decode_equals_the_pipeline_and_passes_gradients(fixture_name: str, folder: Path) -> None:
    pipeline, adapter = plain(fixture_name, folder), load(folder)
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0}
    latents = pipeline(
        PROMPTS, generator=generators(SEEDS), output_type="latent", **options
    ).images.requires_grad_()
    expected = adapter.sample(PROMPTS, SEEDS, SamplingConfig(**options))
    images = adapter.decode(latents)
    assert (images - expected).abs().max() == 0
    images.square().sum().backward()
    assert latents.grad is not None
    assert latents.grad.abs().max() > 0


def test_half_precision_autoencoder_does_not_overflow(tiny_sdxl: Path) -> None:
    adapter: Any = load(tiny_sdxl, dtype="float16")
    vae, images = adapter.pipeline.vae, torch.ones(1, 3, 16, 16)
    with torch.no_grad():
        vae.encoder.conv_in.weight.fill_(6e4)
        assert vae.encode(images.half()).latent_dist.mean.isnan().any()
    for moment in adapter.encode_images(images):
        assert moment.dtype == torch.float32
        assert moment.isfinite().all()
    assert vae.dtype == torch.float16


def test_half_precision_autoencoder_encodes_and_decodes_in_float32(
    folder: Path, fixture_name: str
) -> None:
    half, full = load(folder, dtype="bfloat16"), load(folder)
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    (mean, std), expected = half.encode_images(images), full.encode_images(images)
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean, expected.mean, rtol=0.05, atol=0.005)
    torch.testing.assert_close(half.decode(mean), full.decode(mean), rtol=0, atol=0.01)


def test_half_precision_runs_and_stays_close(folder: Path, fixture_name: str) -> None:
    sampling = SamplingConfig(num_inference_steps=2, guidance_scale=2.0)
    half, full = load(folder, dtype="bfloat16"), load(folder)
    assert next(half.denoiser.parameters()).dtype == torch.bfloat16
    images = half.sample(PROMPTS, SEEDS, sampling)
    assert images.dtype == torch.float32
    noise = [torch.randn(99, dtype=half.denoiser.dtype, generator=torch.Generator().manual_seed(0))]
    noise += [torch.randn(99, generator=torch.Generator().manual_seed(0)).to(noise[0].dtype)]
    if torch.allclose(
        *noise, atol=0.05
    ):  # torch 2.11 draws other numbers from the same seed in bfloat16
        assert (images - full.sample(PROMPTS, SEEDS, sampling)).abs().mean() < 0.05
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    guidance = torch.tensor([3.0, 8.0]) if fixture_name == "tiny_lcm" else None
    outputs = []
    for adapter in (half, full):
        condition = adapter.encode_condition(PROMPTS[:2], height=16, width=16)
        timesteps = torch.tensor([10, 900])
        outputs.append(
            adapter.predict(latents, timesteps, condition, guidance_scale=guidance).float()
        )
    assert (outputs[0] - outputs[1]).abs().max() < 0.1


def test_released_encoders_come_back(folder: Path) -> None:
    adapter: Any = load(folder)
    sampling = SamplingConfig(num_inference_steps=2)
    images, fingerprint = adapter.sample(PROMPTS, SEEDS, sampling), adapter.fingerprint
    adapter.release_encoders()
    assert all(getattr(adapter._pipeline, name) is None for name in adapter.encoders)
    assert torch.equal(adapter.sample(PROMPTS, SEEDS, sampling), images)
    adapter.release_encoders()
    condition = adapter.encode_condition(PROMPTS, height=16, width=16)
    again = load(folder)
    assert again.fingerprint == fingerprint
    torch.testing.assert_close(condition, again.encode_condition(PROMPTS, height=16, width=16))


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl"])
def test_fingerprint_sees_frozen_parts_only(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    first, second, third = load(folder), load(folder), load(folder)
    with torch.no_grad():
        next(first.denoiser.parameters()).add_(1)
        next(iter(second.pipeline.text_encoder.parameters())).view(-1)[0].add_(1)
    assert first.fingerprint == third.fingerprint
    assert second.fingerprint != third.fingerprint
    assert load(folder, dtype="bfloat16").fingerprint != third.fingerprint


def test_a_wrapped_denoiser_is_unwrapped_for_sampling(tiny_sd: Path) -> None:
    adapter = load(tiny_sd)
    sampling = SamplingConfig(num_inference_steps=2)
    images = adapter.sample(PROMPTS, SEEDS, sampling)
    adapter.denoiser = torch.nn.DataParallel(adapter.denoiser).train()
    assert torch.equal(adapter.sample(PROMPTS, SEEDS, sampling), images)
    assert adapter.denoiser.module.training


def test_unsuitable_sampling_options_are_named(tiny_lcm: Path, tiny_sd: Path) -> None:
    with pytest.raises(InputError, match=r"sampling\.eta: LCMScheduler takes no eta"):
        load(tiny_lcm).sample(["x"], [0], SamplingConfig(eta=0.5))
    adapter = load(tiny_sd)
    with pytest.raises(InputError, match=r"divisible by 8 but are 20"):
        adapter.sample(["x"], [0], SamplingConfig(height=20, width=16))
    with pytest.raises(InputError, match="num_inference_steps: must be at least 1"):
        adapter.sample(["x"], [0], SamplingConfig(num_inference_steps=0))
    with pytest.raises(ValueError, match="1 prompts but 2 seeds"):
        adapter.sample(["x"], [0, 1], SamplingConfig())


def test_guidance_scales_belong_to_consistency_models(tiny_lcm: Path, tiny_sd: Path) -> None:
    latents, timesteps = torch.zeros(1, 4, 8, 8), torch.tensor([5])
    consistency, diffusion = load(tiny_lcm), load(tiny_sd)
    condition = consistency.encode_condition(["x"], height=16, width=16)
    with pytest.raises(InputError, match="use consistency-dpo"):
        consistency.predict(latents, timesteps, condition)
    with pytest.raises(ValueError, match="no guidance embedding"):
        diffusion.predict(latents, timesteps, condition, guidance_scale=torch.ones(1))


def test_sdxl_empty_prompt_is_what_guidance_subtracts(tiny_sdxl: Path) -> None:
    condition = load(tiny_sdxl).encode_condition(["", "red"], height=16, width=24)
    _, negative, _, pooled = plain("tiny_sdxl", tiny_sdxl).encode_prompt("red", device="cpu")
    assert torch.equal(condition["prompt_embeds"][:1], negative)
    assert torch.equal(condition["pooled_prompt_embeds"][:1], pooled)
    assert condition["prompt_embeds"][1].abs().max() > 0
    assert condition["time_ids"].tolist() == [[16, 24, 0, 0, 16, 24]] * 2
