"""Rewards by name, imported as `mmalign.rewards`; the folder stands at the top of the repository.

A name is looked up in the table below, then among installed entry points of group
`mmalign.rewards`, and may also be a dotted path `module:attribute`. Importing this package imports
neither torch nor any reward.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from functools import partial
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, cast

if __name__ == "rewards":  # the repository root is on sys.path: classes would exist twice
    raise ImportError(
        "import mmalign.rewards, not rewards: run from outside the repository root or install"
    )

from mmalign.rewards._options import check_types
from mmalign.types import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmalign.config import RewardConfig
    from mmalign.types import Modality, Reward

ENTRY_POINT_GROUP = "mmalign.rewards"
_SCORED = {"image": "images", "text": "answers", "audio": "sounds"}
REWARDS = {
    "aesthetic": "mmalign.rewards.aesthetic:AestheticReward",
    "brightness": "mmalign.rewards.brightness:BrightnessReward",
    "callable": "mmalign.rewards.function:CallableReward",
    "caption_evidence": "mmalign.rewards.caption_evidence:CaptionEvidenceReward",
    "chair": "mmalign.rewards.chair:ChairReward",
    "clip": "mmalign.rewards.clip:ClipReward",
    "command": "mmalign.rewards.command:CommandReward",
    "geneval": "mmalign.rewards.geneval:GenevalReward",
    "hpsv2": "mmalign.rewards.hpsv2:HpsV2Reward",
    "http": "mmalign.rewards.http:HttpReward",
    "imagereward": "mmalign.rewards.imagereward:ImageRewardReward",
    "jpeg": "mmalign.rewards.jpeg:JpegReward",
    "judge": "mmalign.rewards.judge:JudgeReward",
    "length": "mmalign.rewards.length:LengthReward",
    "lpips": "mmalign.rewards.lpips:LpipsReward",
    "mps": "mmalign.rewards.mps:MpsReward",
    "people": "mmalign.rewards.people:PeopleReward",
    "pickscore": "mmalign.rewards.pickscore:PickScoreReward",
    "safety": "mmalign.rewards.safety:SafetyReward",
    "saturation": "mmalign.rewards.saturation:SaturationReward",
    "similarity": "mmalign.rewards.similarity:SimilarityReward",
    "vqascore": "mmalign.rewards.vqascore:VqaScoreReward",
    "yes_no": "mmalign.rewards.yes_no:YesNoReward",
}


def load_reward(
    config: RewardConfig, device: str = "cpu", modality: Modality | None = "image"
) -> Reward:
    """Make the reward that `config` names.

    A class is called with `config.options`, and with `device` if it has such a parameter. An object
    that already is a reward is used as it is. Any other callable is wrapped as
    `fn(images, prompts, **options)`.

    Args:
        config: name and options; weight and normalization are for `CombinedReward`.
        device: torch device of the reward's networks.
        modality: what will be scored; plain functions are taken to score just that. None for
            whatever the reward scores.

    Raises:
        InputError: for an unknown name, a path that cannot be imported, options that the reward
            does not take, a class that is not a reward, or one that scores something else.
    """
    reward = _load(config, device, modality or "image")
    if modality is not None and reward.modality != modality:
        raise InputError(
            f"reward {config.name!r} scores {_SCORED.get(reward.modality, reward.modality)}, "
            f"not {_SCORED[modality]}"
        )
    return reward


def _load(config: RewardConfig, device: str, modality: Modality) -> Reward:
    from mmalign.types import Reward

    target = _find(config.name)
    if inspect.isclass(target):
        reward = target(**_arguments(target, config, device))
        if not isinstance(reward, Reward):
            raise InputError(
                f"reward {config.name!r}: {target.__name__} lacks one of name, modality, "
                "differentiable, range or __call__"
            )
        return reward
    if isinstance(target, Reward):
        return target
    if not callable(target):
        raise InputError(f"reward {config.name!r} is a {type(target).__name__}, not a callable")
    from mmalign.rewards.function import CallableReward

    return CallableReward(partial(target, **config.options), name=config.name, modality=modality)


def load_rewards(
    configs: Sequence[RewardConfig], device: str = "cpu", modality: Modality = "image"
) -> list[tuple[Reward, RewardConfig]]:
    """Load several rewards, each beside its configuration, for `CombinedReward` and evaluation."""
    return [(load_reward(config, device, modality), config) for config in configs]


def import_dotted(path: str) -> object:
    """Import `module:attribute` (or `module:object.attribute`).

    Raises:
        InputError: if the module or the attribute does not exist.
    """
    module_name, _, attribute = path.partition(":")
    try:
        found: object = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"cannot import {path!r}: {error}; use module:attribute") from error
    return found


def _find(name: str) -> object:
    if name in REWARDS:
        return import_dotted(REWARDS[name])
    installed = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
    if name in installed:
        try:
            return cast("object", installed[name].load())
        except (ImportError, AttributeError) as error:
            raise InputError(f"reward {name!r} is installed but broken: {error}") from error
    if ":" in name:
        return import_dotted(name)
    known = sorted({*REWARDS, *installed})
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    raise InputError(
        f"unknown reward {name!r}: did you mean {nearest!r}? Known: {', '.join(known)}, "
        "or a dotted path module:callable"
    )


def _arguments(target: type, config: RewardConfig, device: str) -> dict[str, Any]:
    signature = inspect.signature(target)
    arguments = dict(config.options)
    if "device" in signature.parameters:
        arguments.setdefault("device", device)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        names = ", ".join(signature.parameters) or "none"
        raise InputError(
            f"options of reward {config.name!r}: {error}; it takes: {names}"
        ) from error
    check_types(config.name, target, arguments)
    return arguments
