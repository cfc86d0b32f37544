"""LoRA for other programs: kohya's file format, and checkpoints with the LoRA folded in."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import fuse_text_encoder_lora
from diffusers.utils import convert_state_dict_to_kohya
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from mmalign.data.files import write_bytes
from mmalign.lora import ADAPTER_NAME, LoraFile, read_lora
from mmalign.sharding import unwrapped
from mmalign.types import InputError

_KOHYA_PREFIX = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


class MergeableAdapter(Protocol):
    """What `export_merged` needs of an adapter: its pipeline, and a fresh one around a denoiser."""

    denoiser: nn.Module

    @property
    def pipeline(self) -> DiffusionPipeline: ...  # noqa: D102

    def complete_pipeline(self, unet: nn.Module) -> DiffusionPipeline: ...  # noqa: D102


def export_kohya(adapter: Path | str, file: Path | str) -> Path:
    """Write a LoRA in the format of kohya's scripts, which A1111 and ComfyUI read.

    Every layer gets its alpha, with which readers multiply by alpha / rank.

    Args:
        adapter: folder or file of a LoRA with PEFT's keys, as `save_lora` writes them.
        file: `.safetensors` file to write.

    Raises:
        InputError: the LoRA cannot be read, has other keys, or `file` cannot be written.
    """
    lora = read_lora(adapter)
    if not all(".lora_A." in name or ".lora_B." in name for name in lora.tensors):
        raise InputError(f"{lora.path}: has other keys than PEFT's; only such files are exported")
    converted: dict[str, Tensor] = convert_state_dict_to_kohya(dict(lora.tensors))
    for name, tensor in lora.tensors.items():
        if ".lora_A." in name:
            module = name.split(".lora_A.")[0]
            component, _, inside = module.partition(".")
            # diffusers' converter writes the rank as alpha, which doubles or halves a LoRA.
            key = f"{_KOHYA_PREFIX[component]}_{inside.replace('.', '_')}.alpha"
            converted[key] = torch.tensor(_kohya_alpha(lora, component, inside, len(tensor)))
    target = Path(file)
    write_bytes(target, save(converted, metadata={"format": "pt"}))
    return target


def export_merged(adapter: MergeableAdapter, folder: Path | str) -> None:
    """Write a complete checkpoint in diffusers' format with the LoRA folded into the weights.

    Weights are folded in float32 and written in the dtype of the loaded model.

    Raises:
        InputError: the folder cannot be written.
    """
    unet = _merged(unwrapped(adapter.denoiser))
    pipeline: Any = adapter.complete_pipeline(unet)
    current: Any = adapter.pipeline
    for name in _TEXT_ENCODERS:
        if getattr(getattr(current, name, None), "peft_config", None):
            setattr(pipeline, name, _merged(getattr(current, name)))
    try:
        pipeline.save_pretrained(folder, safe_serialization=True)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot be written: {error}") from error


def _merged(model: nn.Module) -> nn.Module:
    """Copy a model with its LoRA folded in, on CPU."""
    dtype = next(model.parameters()).dtype
    merged = copy.deepcopy(model).cpu().float()
    fuse_text_encoder_lora(merged, adapter_names=[ADAPTER_NAME])
    recurse_remove_peft_layers(merged)
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        if hasattr(merged, attribute):
            delattr(merged, attribute)
    nn.Module.to(merged, dtype)  # diffusers' own warns of float32 modules that are not there
    return merged


def _kohya_alpha(lora: LoraFile, component: str, module: str, rank: int) -> float:
    """Return the alpha with which alpha / rank is the scale of PEFT."""
    settings = lora.settings
    pattern: dict[str, float] = settings.get(f"{component}.alpha_pattern", {})
    default = float(settings.get(f"{component}.lora_alpha", rank))
    alpha = float(pattern.get(get_pattern_key(list(pattern), module), default))
    return alpha * math.sqrt(rank) if settings.get(f"{component}.use_rslora") else alpha
