"""LoRA of a vision-language model: attach, save and load in PEFT's own format.

`PeftModel.from_pretrained(base, folder)` computes exactly what was trained. Only layers of the
language model are targets: vision towers have layers of the same names. Of the settings in a file
that somebody else made only those that say how to scale the update are used, and pickles are
refused.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmalign.config import VlmLoraConfig, as_path
from mmalign.lora import ADAPTER_NAME, attach_lora, scratch_folder
from mmalign.processes import is_main
from mmalign.sharding import full, unwrapped
from mmalign.types import InputError

LANGUAGE_MODEL = "model.language_model"
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_NUMBERS = ("r", "lora_alpha")
_PATTERNS = ("rank_pattern", "alpha_pattern")
_SWITCHES = ("use_rslora", "use_dora", "lora_bias")


@dataclass(frozen=True)
class PeftFile:
    """A LoRA as read from a folder: tensors by key inside the model, and the accepted settings."""

    path: Path
    tensors: dict[str, Tensor]
    settings: dict[str, Any]

    @property
    def layers(self) -> list[str]:
        """Names of the layers it changes."""
        return sorted({name.split(".lora_")[0] for name in self.tensors})


def attach_vlm_lora(model: nn.Module, config: VlmLoraConfig, seed: int) -> None:
    """Freeze `model` and add a trainable LoRA to its language model that changes nothing yet.

    Raises:
        InputError: rank, alpha or targets are unusable, or are not those of `config.init_from`.
    """
    attach_lora(model, replace(config, init_from=None), seed, within=LANGUAGE_MODEL)
    if config.init_from is None:
        return
    file = read_vlm_lora(config.init_from)
    own = get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME)
    same = {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in file.tensors.items()}
    alpha = float(config.rank if config.alpha is None else config.alpha)
    if not same or float(file.settings.get("lora_alpha", config.rank)) != alpha:
        raise InputError(
            f"lora.init_from: {file.path} has another rank, alpha or other layers than lora.rank, "
            "lora.alpha and lora.targets say"
        )
    set_peft_model_state_dict(model, file.tensors, adapter_name=ADAPTER_NAME)


def save_vlm_lora(model: nn.Module, folder: Path | str, base: str) -> Path:
    """Write the LoRA of `model` as PEFT does; each file appears complete or not at all.

    Several processes call it together, and the main one writes.

    Args:
        model: has the LoRA.
        folder: receives `adapter_model.safetensors` and `adapter_config.json`.
        base: name of the model below it.

    Raises:
        InputError: the folder cannot be written.
    """
    bare: Any = unwrapped(model)
    state = get_peft_model_state_dict(bare, adapter_name=ADAPTER_NAME)
    tensors = {f"{_PREFIX}{n}": full(t.detach()).cpu().contiguous() for n, t in state.items()}
    if not is_main():
        return Path(folder)
    settings = replace(
        bare.peft_config[ADAPTER_NAME], base_model_name_or_path=base, inference_mode=True
    )
    target = Path(folder)
    try:
        with scratch_folder(target) as scratch:
            save_file(tensors, scratch / WEIGHTS, metadata={"format": "pt"})
            settings.save_pretrained(scratch)
            for name in (SETTINGS, WEIGHTS):
                os.replace(scratch / name, target / name)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{target}: cannot be written: {error}") from error
    return target


def load_vlm_lora(model: nn.Module, path: Path | str, *, fold: bool) -> None:
    """Load a LoRA on top of `model`, which has none yet.

    Args:
        model: a vision-language model of transformers.
        path: folder in PEFT's format.
        fold: add it to the weights instead of keeping it as an adapter.

    Raises:
        InputError: there is no such LoRA, it is a pickle or damaged, or was made for another model.
    """
    file = read_vlm_lora(path)
    settings = peft.LoraConfig(**file.settings, target_modules=file.layers)
    try:
        cast(Any, model).add_adapter(settings, adapter_name=ADAPTER_NAME)
        result = set_peft_model_state_dict(model, file.tensors, adapter_name=ADAPTER_NAME)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{file.path}: does not fit the model: {reason}") from error
    layers = [name for name, _ in _lora_layers(model)]
    if result.unexpected_keys or sorted(layers) != file.layers:
        raise InputError(
            f"{file.path}: was made for another model: {len(layers)} of its {len(file.layers)}"
            " layers fit"
        )
    model.requires_grad_(False)
    if fold:
        _fold(model)


def read_vlm_lora(path: Path | str) -> PeftFile:
    """Read a LoRA in PEFT's format.

    Raises:
        InputError: there is no such LoRA, it is a pickle, or damaged.
    """
    folder = as_path(path)
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = folder.is_dir() and any(folder.glob("*.bin"))
        problem = "has only pickled weights, which are never loaded" if pickled else "no adapter:"
        raise InputError(
            f"{folder}: {problem} {'' if pickled else f'there is no {WEIGHTS}'}".strip()
        )
    try:
        with safe_open(file, framework="pt") as content:
            tensors = {
                name.removeprefix(_PREFIX): content.get_tensor(name)
                for name in content.keys()  # noqa: SIM118
            }
        settings = json.loads((folder / SETTINGS).read_text("utf-8"))
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder}: cannot be read: {reason}") from error
    if not tensors or not all(".lora_" in name for name in tensors):
        raise InputError(f"{file}: is not a LoRA")
    return PeftFile(folder, tensors, _accepted(folder / SETTINGS, settings))


def _accepted(file: Path, settings: object) -> dict[str, Any]:
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise InputError(f"{file}: is not the settings of a LoRA")
    accepted: dict[str, Any] = {}
    for name in (*_NUMBERS, *_PATTERNS, *_SWITCHES):
        value = settings.get(name)
        if value is None:
            continue
        values = value.values() if name in _PATTERNS and isinstance(value, dict) else [value]
        wanted = bool if name in _SWITCHES else (int, float)
        if name in _PATTERNS and not isinstance(value, dict):
            raise InputError(f"{file}: {name} is {value!r}")
        if not all(isinstance(v, wanted) and (name in _SWITCHES or v > 0) for v in values):
            raise InputError(f"{file}: {name} is {value!r}")
        accepted[name] = value
    return accepted


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and ADAPTER_NAME in cast(Any, module).lora_A
    ]


@torch.no_grad()
def _fold(model: nn.Module) -> None:
    """Add the LoRA to the weights and put the plain layers back."""
    for name, layer in _lora_layers(model):
        layer.merge(adapter_names=[ADAPTER_NAME])
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    bare = cast(Any, model)
    del bare.peft_config
    bare._hf_peft_config_loaded = False
