"""Which options of the preference loss a run uses: those that it would ignore are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from mmalign.config.parts import LossType, PreferenceConfig
from mmalign.types import InputError

_CONSTANTS: Mapping[str, frozenset[LossType]] = {
    "label_smoothing": frozenset({"robust", "cdpo", "exo_pair", "aot", "aot_unpaired"}),
    "alpha": frozenset({"alpha"}),
    "offset_scale": frozenset({"offset"}),
    "target_margin": frozenset({"simpo"}),
    "discopop_tau": frozenset({"discopop"}),
}
"""Members of the family that read each constant."""
_TEXT_LOSSES: frozenset[LossType] = frozenset({"aot", "sft", "simpo", "sigmoid_norm"})


def check_constants(config: PreferenceConfig, *, texts: bool) -> None:
    """Check that the configured loss uses every option that was changed.

    Args:
        config: the loss and its constants.
        texts: whether answers are texts, which have log-probs and lengths of their own.

    Raises:
        InputError: naming a constant of another loss, or what exists for texts only.
    """
    changed = _changed(config)
    for name, losses in _CONSTANTS.items():
        if name in changed and config.loss_type not in losses:
            raise InputError(
                f"{name}: loss_type {config.loss_type} does not use it, only"
                f" {', '.join(sorted(losses))}; leave it out or choose such a loss_type"
            )
    if not texts and config.loss_type in _TEXT_LOSSES:
        raise InputError(f"loss_type: {config.loss_type} exists for texts only; use another one")
    if not texts and config.length_normalize:
        raise InputError("length_normalize: images have no length; leave it out")


def refuse_preference(owner: str, config: PreferenceConfig) -> None:
    """Check that nothing was changed, for a method that uses no preference loss.

    Args:
        owner: the method, such as `mapo` or `preset ddpo`.
        config: the loss and its constants.

    Raises:
        InputError: naming the options that would be ignored.
    """
    changed = [f"{name} {value}" for name, value in _changed(config).items()]
    if changed:
        raise InputError(f"{owner} fixes its losses: leave out {', '.join(changed)}")


def _changed(config: PreferenceConfig) -> dict[str, object]:
    """List the options of the loss that are not at their defaults."""
    values = {field.name: getattr(config, field.name) for field in fields(PreferenceConfig)}
    return {name: v for name, v in values.items() if v != getattr(PreferenceConfig, name)}
