"""The method a run is configured with: a preset, with the settings that the user changed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

from mmalign.config import VlmDpoConfig
from mmalign.objectives.vlm_presets import PRESETS
from mmalign.objectives.vlm_rows import ImageSettings, PerturbSettings, Preset, adapt, plan_rows
from mmalign.types import InputError

Settings = TypeVar("Settings", ImageSettings, PerturbSettings)


def resolve_preset(config: VlmDpoConfig) -> Preset:
    """Find the preset and apply what the configuration changes.

    Raises:
        InputError: there is no such preset, part or setting, a value is of the wrong type, or a
            model is missing that the preset needs.
    """
    if config.preset not in PRESETS:
        nearest = difflib.get_close_matches(config.preset, PRESETS, n=1, cutoff=0.0)[0]
        raise InputError(f"preset: there is no {config.preset!r}; the nearest is {nearest!r}")
    preset = adapt(PRESETS[config.preset], weights=config.weights, perturbed=config.perturbed)
    if config.clip_model is None and any(row.text == "perturbed" for row in plan_rows(preset)):
        raise InputError(
            f"clip_model: preset {preset.name} perturbs texts and needs an open_clip model, such as"
            " ViT-L-14 with clip_pretrained openai"
        )
    return replace(
        preset,
        images=_changed(preset.images, config.image_settings, "image_settings"),
        perturb=_changed(preset.perturb, config.perturb_settings, "perturb_settings"),
    )


def _changed(settings: Settings, changes: Mapping[str, Any], where: str) -> Settings:
    kinds = {field.name: type(getattr(settings, field.name)) for field in fields(settings)}
    for name, value in changes.items():
        if name not in kinds:
            nearest = difflib.get_close_matches(name, kinds, n=1, cutoff=0.0)[0]
            raise InputError(f"{where}: there is no {name!r}; the nearest is {nearest!r}")
        wanted: tuple[type, ...] = (int, float) if kinds[name] is float else (kinds[name],)
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise InputError(f"{where}.{name}: expected a {kinds[name].__name__}, got {value!r}")
    return replace(settings, **changes)
