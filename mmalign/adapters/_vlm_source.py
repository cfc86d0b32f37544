"""Where a vision-language checkpoint comes from, and whether it is one that can be loaded.

A checkpoint is hostile until checked: only known model types of transformers are loaded, only from
safetensors, and never with code of its own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash

from mmalign.adapters._folder import first_line, local_folder
from mmalign.config import VlmModelConfig
from mmalign.data.weight_index import refuse_foreign_shards
from mmalign.lora import lora_scaling
from mmalign.types import InputError

SAMPLES = 1024
VlmFamilyName = Literal["llava", "qwen_vl"]
MODEL_TYPES: dict[str, VlmFamilyName] = {
    "llava": "llava",
    "llava_next": "llava",
    "qwen2_vl": "qwen_vl",
    "qwen2_5_vl": "qwen_vl",
    "qwen3_vl": "qwen_vl",
}


@dataclass(frozen=True, kw_only=True)
class VlmSource:
    """A checked checkpoint.

    Attributes:
        name: the model as the user named it, for messages.
        location: local folder or hub id.
        family: model family.
        model_type: transformers' name of the architecture.
        dtype: dtype of the weights.
        options: keyword arguments of every `from_pretrained`.
    """

    name: str
    location: str
    family: VlmFamilyName
    model_type: str
    dtype: torch.dtype
    options: dict[str, Any]


def find_vlm(config: VlmModelConfig) -> VlmSource:
    """Find and check the checkpoint that `config` names.

    Raises:
        InputError: it does not exist, is of an unsupported kind, or has only pickled weights.
    """
    if not config.model:
        raise InputError("model: is required: a folder in transformers' format or a hub id")
    options: dict[str, Any] = {"local_files_only": config.offline, "trust_remote_code": False}
    if config.revision is not None:
        options["revision"] = config.revision
    folder = local_folder(config.model, "a folder in transformers' format")
    if folder is None:
        content = _hub_config(config, options)
    else:
        content = _read_config(config.model, folder)
        _check_weights(config.model, folder)
    location = config.model if folder is None else str(folder)
    refuse_foreign_shards(location, revision=config.revision, offline=config.offline)
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise InputError(
            f"{config.model}: unknown model_type {model_type!r} in config.json;"
            f" supported are {known}"
        )
    family = MODEL_TYPES[model_type]
    if config.family not in ("auto", family):
        raise InputError(f"{config.model}: family is {family}, not {config.family}; use auto")
    return VlmSource(
        name=config.model,
        location=location,
        family=family,
        model_type=model_type,
        dtype=getattr(torch, config.dtype),
        options=options,
    )


def _hub_config(config: VlmModelConfig, options: dict[str, Any]) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    hub = {key: value for key, value in options.items() if key != "trust_remote_code"}
    try:
        content: dict[str, Any] = PreTrainedConfig.get_config_dict(config.model, **hub)[0]
    except (OSError, ValueError) as error:
        where = "in the local cache" if config.offline else "on the hub"
        raise InputError(
            f"{config.model}: neither a local folder nor found {where}: {first_line(error)}"
        ) from error
    return content


def _read_config(name: str, folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{name}: has no config.json; give a folder in transformers' format"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: is not a JSON object")
    return content


def _check_weights(name: str, folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        raise InputError(
            f"{name}: has only pickled weights, which are never loaded; convert them to safetensors"
        )
    raise InputError(f"{name}: has no .safetensors weights")


def fingerprint_of(model: Any, processor: Any) -> str:
    """Hash settings, tokenizer, template, and evenly spaced samples of every weight.

    All weights of a large model would take minutes, and a fine-tuned one differs everywhere.
    """
    digest = xxhash.xxh3_128()
    tokenizer = processor.tokenizer
    for text in (
        type(model).__name__,
        json.dumps(_settings(model.config.to_dict()), default=str, sort_keys=True),
        lora_scaling(model),
        processor.to_json_string(),
        str(processor.chat_template or tokenizer.chat_template),
        tokenizer.backend_tokenizer.to_str(),
    ):
        digest.update(text.encode())
    for name, value in model.state_dict().items():
        flat = value.detach().reshape(-1)
        picked = flat[:: max(1, len(flat) // SAMPLES)].cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(picked.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """Leave out what wrote a configuration and where, at every depth."""
    return {
        key: _settings(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not str(key).startswith("_") and key != "transformers_version"
    }
