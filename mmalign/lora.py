"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685): attach, save, load.

An update of rank r adds (alpha / r) B A x to a layer, with A (r, in) and B (out, r); the B of a
convolution is 1 x 1. Files hold PEFT's own keys and the settings they need, so that plain
`pipeline.load_lora_weights(folder)` computes exactly what was trained. diffusers' older key style
loses convolutions, and files without settings lose alpha.

A file that somebody else made is hostile: of its settings only numbers that say how to scale the
update are used, and pickles are refused.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import diffusers
import peft
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mmalign.config import LoraConfig, as_path
from mmalign.randomness import keyed_generator
from mmalign.sharding import unwrapped
from mmalign.types import InputError

ADAPTER_NAME = "default"
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_NUMBERS = ("r", "lora_alpha")
_PATTERNS = ("rank_pattern", "alpha_pattern")
_SWITCHES = ("use_rslora", "use_dora", "lora_bias")
_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as read from a file: tensors by key, and the accepted settings by `component.name`."""

    path: Path
    tensors: dict[str, Tensor]
    settings: dict[str, Any]


def attach_lora(
    denoiser: nn.Module, config: LoraConfig, seed: int, *, within: str | None = None
) -> None:
    """Freeze `denoiser` and add a trainable LoRA that changes nothing yet.

    `within` names the part of the network whose layers may be targets; any when omitted.

    A is drawn from a normal distribution of standard deviation 1 / rank, keyed by (seed, layer),
    and B is 0, unless `config.init_from` names a LoRA to go on from. The LoRA is float32 whatever
    the dtype of the denoiser.

    Raises:
        InputError: rank, alpha or targets are unusable, or are not those of `config.init_from`.
    """
    if config.rank < 1 or (config.alpha is not None and config.alpha <= 0):
        raise InputError(
            f"lora: rank and alpha must be positive, got {config.rank}, {config.alpha}"
        )
    _check_targets(denoiser, config.targets, within)
    denoiser.requires_grad_(False)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=cast(int, config.rank if config.alpha is None else config.alpha),
        target_modules=_target_pattern(config.targets, within),
        init_lora_weights="gaussian",
    )
    try:
        cast(Any, denoiser).add_adapter(settings, adapter_name=ADAPTER_NAME)
    except ValueError as error:
        raise InputError(f"lora.targets: {str(error).splitlines()[0]}") from error
    for name, layer in _lora_layers(denoiser):
        down, up = layer.lora_A[ADAPTER_NAME].float(), layer.lora_B[ADAPTER_NAME].float()
        draw = torch.randn(down.weight.shape, generator=keyed_generator(seed, name, "lora"))
        with torch.no_grad():
            down.weight.copy_(draw / config.rank)
            up.weight.zero_()
    if config.init_from is not None:
        _go_on(denoiser, config, read_lora(config.init_from))


def _go_on(denoiser: nn.Module, config: LoraConfig, file: LoraFile) -> None:
    """Put a file's weights into a LoRA of the same shape and scale."""
    shapes = {
        name: tensor.shape
        for name, tensor in get_peft_model_state_dict(denoiser, adapter_name=ADAPTER_NAME).items()
    }
    found = {name.removeprefix("unet."): tensor for name, tensor in file.tensors.items()}
    alpha = float(config.rank if config.alpha is None else config.alpha)
    same = {name: tensor.shape for name, tensor in found.items()} == shapes
    if not same or float(file.settings.get("unet.lora_alpha", config.rank)) != alpha:
        raise InputError(
            f"lora.init_from: {file.path} has another rank, alpha or other layers than lora.rank, "
            "lora.alpha and lora.targets say"
        )
    set_peft_model_state_dict(denoiser, found, adapter_name=ADAPTER_NAME)


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder inside `folder` for the block; what a killed run has left goes as well.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".lora-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".lora-") as scratch:
        yield Path(scratch)


def save_lora(denoiser: nn.Module, folder: Path | str) -> Path:
    """Write the LoRA of `denoiser` to `folder/pytorch_lora_weights.safetensors`, atomically.

    Raises:
        InputError: the folder cannot be written.
    """
    unet: Any = unwrapped(denoiser)
    settings = unet.peft_config[ADAPTER_NAME].to_dict()
    kept = {name: settings[name] for name in (*_NUMBERS, *_PATTERNS, *_SWITCHES)}
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(unet, adapter_name=ADAPTER_NAME).items()
    }
    path = Path(folder) / WEIGHTS_NAME
    try:
        with scratch_folder(path.parent) as scratch:
            StableDiffusionPipeline.save_lora_weights(
                scratch,
                unet_lora_layers=tensors,
                unet_lora_adapter_metadata={**kept, "target_modules": _module_names(tensors)},
            )
            os.replace(scratch / WEIGHTS_NAME, path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be written: {error}") from error
    return path


def load_lora(pipeline: DiffusionPipeline, path: Path | str, *, scale: float = 1.0) -> None:
    """Load a LoRA of the denoiser (and text encoders) into `pipeline` and scale it.

    Files of PEFT, diffusers and kohya are accepted; `pipeline` must have no LoRA yet.

    Args:
        pipeline: a Stable Diffusion, SDXL or latent consistency pipeline.
        path: file, or folder with one .safetensors file.
        scale: multiplier of the update.

    Raises:
        InputError: there is no such file, it is a pickle or damaged, or was made for another model.
    """
    file = read_lora(path)
    loader = cast(Any, pipeline)
    is_xl = hasattr(pipeline, "text_encoder_2")
    try:
        with _silent_diffusers():
            tensors, alphas = loader.lora_state_dict(
                dict(file.tensors), **({"unet_config": loader.unet.config} if is_xl else {})
            )
            _inject(loader, file, tensors, alphas)
    except InputError:
        raise
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise InputError(f"{file.path}: does not fit the model: {_first_line(error)}") from error
    # Not frozen, as in diffusers: on some processors torch picks another kernel, and so other last
    # bits, for weights that need no gradient.
    loader.set_adapters([ADAPTER_NAME], [scale])


def lora_scaling(module: nn.Module) -> str:
    """Say by what each LoRA in a network is multiplied, which its weights do not tell.

    Args:
        module: the network.

    Returns:
        A line per layer with a LoRA, for hashes; empty where there is none.
    """
    return "".join(
        f"{name} {sorted(layer.scaling.items())}\n"
        for name, layer in sorted(module.named_modules())
        if isinstance(layer, BaseTunerLayer)
    )


def read_lora(path: Path | str) -> LoraFile:
    """Read a LoRA file.

    Raises:
        InputError: there is no such file, it is a pickle, or damaged.
    """
    file = _find_file(as_path(path))
    try:
        with safe_open(file, framework="pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            metadata = content.metadata() or {}
        settings = json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read: {_first_line(error)}") from error
    if not tensors or not all("lora" in name for name in tensors):
        raise InputError(f"{file}: is not a LoRA")
    return LoraFile(file, tensors, _accepted(file, settings))


def fold_lora(unet: nn.Module) -> None:
    """Add the LoRA of `unet` to its weights and remove it."""
    model = cast(Any, unet)
    model.fuse_lora(adapter_names=[ADAPTER_NAME])
    model.unload_lora()


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and ADAPTER_NAME in cast(Any, module).lora_A:
            yield name, module


def _module_names(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted({name.split(".lora_")[0] for name in tensors})


def _target_pattern(targets: list[str], within: str | None) -> list[str] | str:
    """Return what peft matches module names with: suffixes, or one regular expression."""
    if within is None:
        return list(targets)
    endings = "|".join(map(re.escape, targets))
    return rf"{re.escape(within)}\.(.*\.)?({endings})"


def _check_targets(denoiser: nn.Module, targets: list[str], within: str | None) -> None:
    usable = [
        name
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name.startswith(within or "")
    ]
    endings = dict.fromkeys(map(_ending, usable))
    for target in targets or ["(none given)"]:
        if not any(name == target or name.endswith(f".{target}") for name in usable):
            raise InputError(
                f"lora.targets: {target!r} matches no layer; for example: {', '.join(endings)}"
            )


def _ending(name: str) -> str:
    """Shorten a module name to what one would write as a target: `to_q`, `to_out.0`."""
    parts = name.split(".")
    keep = 2 if parts[-1].isdigit() and len(parts) > 1 else 1
    return ".".join(parts[-keep:])


def _find_file(path: Path) -> Path:
    if path.is_dir():
        if (path / WEIGHTS_NAME).is_file():
            return path / WEIGHTS_NAME
        found = sorted(path.glob("*.safetensors"))
        if len(found) == 1:
            return found[0]
        if len(found) > 1:
            raise InputError(f"{path}: has {len(found)} .safetensors files; name the one to load")
        if any(file.suffix in _PICKLES for file in path.iterdir()):
            raise InputError(f"{path}: has only pickled weights, which are never loaded")
        raise InputError(f"{path}: has no {WEIGHTS_NAME}")
    if not path.is_file():
        raise InputError(f"{path}: no such adapter")
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: is not a .safetensors file; pickled weights are never loaded")
    return path


def _accepted(file: Path, settings: object) -> dict[str, Any]:
    """Keep the settings that scale an update, by `component.name`."""
    if not isinstance(settings, dict):
        raise InputError(f"{file}: its adapter metadata is not a JSON object")
    accepted: dict[str, Any] = {}
    for key, value in settings.items():
        _, _, name = key.partition(".")
        if (
            (name in _NUMBERS and _is_number(value))
            or (name in _SWITCHES and isinstance(value, bool))
            or (
                name in _PATTERNS
                and isinstance(value, dict)
                and all(map(_is_number, value.values()))
            )
        ):
            accepted[key] = value
        elif name in (*_NUMBERS, *_SWITCHES, *_PATTERNS):
            raise InputError(f"{file}: adapter metadata {key} is {value!r}")
    return accepted


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _inject(loader: Any, file: LoraFile, tensors: dict[str, Tensor], alphas: Any) -> None:
    """Put tensors into the components they are named after, and check that all of them fit."""
    expected = 0
    for component in _COMPONENTS:
        own = {name: value for name, value in tensors.items() if name.startswith(f"{component}.")}
        model = getattr(loader, component, None)
        if not own:
            continue
        expected += len(own)
        if model is None:
            raise InputError(f"{file.path}: has weights of {component}, which the model lacks")
        settings = {k: v for k, v in file.settings.items() if k.startswith(f"{component}.")}
        if settings:
            inside = {name.removeprefix(f"{component}."): value for name, value in own.items()}
            settings[f"{component}.target_modules"] = _module_names(inside)
        options: dict[str, Any] = {
            "network_alphas": alphas,
            "adapter_name": ADAPTER_NAME,
            "metadata": settings or None,
            "low_cpu_mem_usage": True,
            "_pipeline": loader,
        }
        if component == "unet":
            loader.load_lora_into_unet(own, unet=model, **options)
        else:
            loader.load_lora_into_text_encoder(own, text_encoder=model, prefix=component, **options)
        _check_loaded(file, component, model, own)
    if expected != len(tensors) or not expected:
        raise InputError(f"{file.path}: has weights of parts that a LoRA here cannot change")


def _check_loaded(file: LoraFile, component: str, model: nn.Module, own: dict[str, Tensor]) -> None:
    """Compare the layers that got a LoRA with those of the file; diffusers only warns."""
    wanted = sum(1 for name in own if ".lora_A." in name or "down." in name)
    layers = [layer for _, layer in _lora_layers(model)]
    empty = any(parameter.is_meta for parameter in model.parameters())
    if len(layers) != wanted or empty:
        raise InputError(
            f"{file.path}: was made for another model: {len(layers)} of its {wanted} layers fit"
            f" {component}"
        )


@contextmanager
def _silent_diffusers() -> Iterator[None]:
    """Keep diffusers from logging at length what becomes one error message here."""
    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(verbosity)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
