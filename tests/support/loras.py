"""LoRAs of tiny image generators, and the pictures that they make here and in plain diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    LatentConsistencyModelPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from mmalign.adapters import DiffusersAdapter, load_adapter
from mmalign.config import (
    ATTENTION_TARGETS,
    LoraConfig,
    ModelConfig,
    SamplingConfig,
)
from mmalign.lora import (
    attach_lora,
)

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
