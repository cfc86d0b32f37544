"""Where a checkpoint comes from, and whether it is one that can be loaded without running its code.

A checkpoint is hostile until checked: its index may name any importable class, and its weights may
be pickles. Only known classes of diffusers and transformers are loaded, and only safetensors.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from huggingface_hub.constants import HF_HUB_OFFLINE

from mmalign.adapters._folder import first_line, local_folder
from mmalign.config import ModelConfig
from mmalign.data.weight_index import refuse_foreign_shards
from mmalign.types import InputError

FamilyName = Literal["sd", "sdxl", "lcm"]
_FAMILIES: dict[str, FamilyName] = {
    "StableDiffusionPipeline": "sd",
    "LatentConsistencyModelPipeline": "lcm",
    "StableDiffusionXLPipeline": "sdxl",
}
_CLASSES = {
    "unet": ("diffusers", ["UNet2DConditionModel"]),
    "vae": ("diffusers", ["AutoencoderKL"]),
    "text_encoder": ("transformers", ["CLIPTextModel"]),
    "text_encoder_2": ("transformers", ["CLIPTextModelWithProjection"]),
    "tokenizer": ("transformers", ["CLIPTokenizer", "CLIPTokenizerFast"]),
    "tokenizer_2": ("transformers", ["CLIPTokenizer", "CLIPTokenizerFast"]),
    "feature_extractor": ("transformers", ["CLIPFeatureExtractor", "CLIPImageProcessor"]),
    "image_encoder": ("transformers", ["CLIPVisionModelWithProjection"]),
    "safety_checker": ("stable_diffusion", ["StableDiffusionSafetyChecker"]),
}
_REQUIRED = {
    "sd": ["unet", "vae", "text_encoder", "tokenizer", "scheduler"],
    "lcm": ["unet", "vae", "text_encoder", "tokenizer", "scheduler"],
    "sdxl": [
        *("unet", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        "scheduler",
    ],
}
_WITH_WEIGHTS = ("unet", "vae", "text_encoder", "text_encoder_2")
_WANTED = (
    "a folder in diffusers' format (convert single files with"
    " from_single_file(...).save_pretrained(...))"
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A checked checkpoint.

    Attributes:
        name: the model as the user named it, for messages.
        location: local folder or hub id.
        family: model family.
        dtype: dtype of the weights.
        denoiser_dtype: dtype of the denoiser's weights.
        options: keyword arguments of `from_pretrained`.
    """

    name: str
    location: str
    family: FamilyName
    dtype: torch.dtype
    denoiser_dtype: torch.dtype
    options: dict[str, Any]


def find_model(config: ModelConfig, *, trains_everything: bool = False) -> ModelSource:
    """Find and check the checkpoint that `config` names.

    With `trains_everything` the denoiser is float32, because `config.dtype` is for frozen weights.

    Raises:
        InputError: it does not exist, is of an unsupported kind, or has only pickled weights.
    """
    folder = local_folder(config.model, _WANTED)
    hub = {"revision": config.revision, "local_files_only": config.offline}
    location = config.model if folder is None else str(folder)
    if folder is None:
        index = _hub_config(config, location, hub, subfolder=None)
        unet = _hub_config(config, location, hub, subfolder="unet")
    else:
        index = _read_json(config.model, folder, "model_index.json")
        unet = {}
    family = _check_index(config, index)
    if folder is not None:
        _refuse_pickles(config.model, folder, index)
        unet = _read_json(config.model, folder, "unet/config.json")
    family = _check_family(config, family, unet)
    for component in _WITH_WEIGHTS:
        if component.startswith("text_encoder") and _is_component(index.get(component)):
            refuse_foreign_shards(
                location,
                subfolder=component,
                variant=config.variant,
                revision=config.revision,
                offline=config.offline,
            )
    dtype: torch.dtype = getattr(torch, config.dtype)
    return ModelSource(
        name=config.model,
        location=location,
        family=family,
        dtype=dtype,
        denoiser_dtype=torch.float32 if trains_everything else dtype,
        options={**hub, "variant": config.variant, "use_safetensors": True},
    )


def _hub_config(
    config: ModelConfig, location: str, hub: dict[str, Any], subfolder: str | None
) -> dict[str, Any]:
    loader: Any = DiffusionPipeline if subfolder is None else UNet2DConditionModel
    try:
        with warnings.catch_warnings():
            # diffusers passes the hub library an argument that it no longer takes
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
            return cast(dict[str, Any], loader.load_config(location, subfolder=subfolder, **hub))
    except (OSError, ValueError) as error:
        where = "on the hub"
        if config.offline or HF_HUB_OFFLINE:
            why = "offline" if config.offline else "HF_HUB_OFFLINE"
            where = f"in the hub's local cache ({why})"
        raise InputError(
            f"{config.model}: neither a local folder nor found {where}: {first_line(error)}"
        ) from error


def _read_json(name: str, folder: Path, inside: str) -> dict[str, Any]:
    file = folder / inside
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{name}: has no {inside}; give a folder in diffusers' format") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: is not a JSON object")
    return content


def _check_index(config: ModelConfig, index: dict[str, Any]) -> FamilyName:
    """Check the classes that a model index names."""
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        raise InputError(f"{config.model}: unknown pipeline class {name!r}; supported are {known}")
    family = _FAMILIES[name]
    for component in _REQUIRED[family]:
        if not _is_component(index.get(component)):
            raise InputError(f"{config.model}: model_index.json has no {component}")
    for component, value in index.items():
        if isinstance(value, list) and value != [None, None] and not component.startswith("_"):
            _check_component(config, component, value)
    return family


def _is_component(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(x, str) for x in value)


def _check_component(config: ModelConfig, component: str, value: list[Any]) -> None:
    library, name = map(str, value) if len(value) == 2 else ("", str(value))
    if component == "scheduler":
        accepted = library == "diffusers" and name.endswith("Scheduler")
    else:
        expected_library, names = _CLASSES.get(component, ("", []))
        accepted = library == expected_library and name in names
    if not accepted:
        raise InputError(
            f"{config.model}: model_index.json asks for {library}.{name} as {component},"
            " which is not supported"
        )


def _refuse_pickles(name: str, folder: Path, index: dict[str, Any]) -> None:
    for component in _WITH_WEIGHTS:
        if not _is_component(index.get(component)):
            continue
        if not (folder / component).is_dir():
            raise InputError(f"{name}: has no folder {component}")
        files = [file.name for file in (folder / component).iterdir()]
        if any(file.endswith(".safetensors") for file in files):
            continue
        if any(file.endswith(_PICKLES) for file in files):
            raise InputError(
                f"{name}: {component} has only pickled weights, which are never loaded;"
                " convert them to safetensors"
            )
        raise InputError(f"{name}: {component} has no .safetensors weights")


def _check_family(config: ModelConfig, family: FamilyName, unet: dict[str, Any]) -> FamilyName:
    """Refine the family by the denoiser, and hold it against the one asked for."""
    embeds_guidance = unet.get("time_cond_proj_dim") is not None
    if family == "sdxl" and embeds_guidance:
        raise InputError(f"{config.model}: SDXL with a guidance embedding is not supported")
    if family == "lcm" and not embeds_guidance:
        raise InputError(
            f"{config.model}: its denoiser has no guidance embedding (time_cond_proj_dim)"
        )
    found: FamilyName = "lcm" if embeds_guidance else family
    if config.family not in ("auto", found):
        raise InputError(f"{config.model}: family is {found}, not {config.family}; use auto")
    return found
