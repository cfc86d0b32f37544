"""Families of models behind the protocols `mmalign.types.ImageAdapter` and `VlmAdapter`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mmalign.adapters._diffusers import DiffusersAdapter
from mmalign.adapters._source import FamilyName, find_model
from mmalign.adapters.lcm import LatentConsistencyAdapter
from mmalign.adapters.sd import StableDiffusionAdapter
from mmalign.adapters.sdxl import StableDiffusionXLAdapter
from mmalign.config import ModelConfig, RunConfig, VlmModelConfig
from mmalign.lora import fold_lora, load_lora

if TYPE_CHECKING:
    from mmalign.adapters._vlm import VlmFamily

__all__ = ["DiffusersAdapter", "load_adapter", "load_vlm"]

_FAMILIES: dict[FamilyName, type[DiffusersAdapter]] = {
    "sd": StableDiffusionAdapter,
    "sdxl": StableDiffusionXLAdapter,
    "lcm": LatentConsistencyAdapter,
}


def load_adapter(
    config: ModelConfig, *, device: torch.device | str, for_training: bool = True
) -> DiffusersAdapter:
    """Load a checkpoint and the LoRA on top of it, everything frozen.

    Args:
        config: the model; `config.device` is ignored.
        device: torch device.
        for_training: fold the LoRA into the weights, so that training starts from it, it is part of
            the reference, and a new LoRA can be attached. Otherwise it stays an adapter.

    Raises:
        InputError: model or LoRA do not exist, are damaged, pickled, of an unsupported kind, or do
            not fit together.
    """
    trains_everything = for_training and isinstance(config, RunConfig) and not config.lora.enabled
    source = find_model(config, trains_everything=trains_everything)
    adapter = _FAMILIES[source.family].load(source, torch.device(device))
    if config.adapter is not None:
        load_lora(adapter.pipeline, config.adapter, scale=config.adapter_scale)
        if for_training:
            fold_lora(adapter.denoiser)
    return adapter


def load_vlm(
    config: VlmModelConfig, device: torch.device | str, *, for_training: bool = False
) -> VlmFamily:
    """Load a vision-language checkpoint and the LoRA on top of it, everything frozen.

    Args:
        config: the model; `config.device` is ignored.
        device: torch device.
        for_training: fold the LoRA into the weights, so that training starts from it, it is part of
            the reference, and a new LoRA can be attached. Otherwise it stays an adapter.

    Raises:
        InputError: model or LoRA do not exist, are damaged, pickled, of an unsupported kind, or do
            not fit together.
    """
    from mmalign.adapters._vlm_source import find_vlm
    from mmalign.adapters.llava import LlavaAdapter
    from mmalign.adapters.qwen_vl import QwenVlAdapter
    from mmalign.vlm_lora import load_vlm_lora

    source = find_vlm(config)
    family = {"llava": LlavaAdapter, "qwen_vl": QwenVlAdapter}[source.family]
    adapter: VlmFamily = family.load(source, torch.device(device))
    if config.adapter is not None:
        load_vlm_lora(adapter.model, config.adapter, fold=for_training)
    return adapter
