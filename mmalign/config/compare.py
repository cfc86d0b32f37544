"""Options of `mmalign compare`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mmalign.config.offline import (
    ConsistencyDpoConfig,
    CurriculumDpoConfig,
    DiffusionDpoConfig,
    DiffusionKtoConfig,
    DroConfig,
    MapoConfig,
)
from mmalign.config.online import D3poConfig, DraftConfig, RocmConfig, TailorpoConfig
from mmalign.config.parts import RunConfig

BudgetUnit = Literal["steps", "reward_queries", "unet_forwards", "seconds"]
TRAIN_CONFIGS: Mapping[str, type[RunConfig]] = {
    "diffusion-dpo": DiffusionDpoConfig,
    "consistency-dpo": ConsistencyDpoConfig,
    "curriculum-dpo": CurriculumDpoConfig,
    "mapo": MapoConfig,
    "diffusion-kto": DiffusionKtoConfig,
    "dro": DroConfig,
    "d3po": D3poConfig,
    "tailorpo": TailorpoConfig,
    "draft": DraftConfig,
    "rocm": RocmConfig,
}
"""The training commands that can be compared, `mmalign train NAME`.

Not `online-dpo`: its rounds are runs of their own, each with its own cost.
"""


@dataclass(kw_only=True)
class BudgetConfig:
    """What every run may spend, pairs built for it included.

    Attributes:
        unit: `steps` (optimizer steps), `reward_queries` (images scored), `unet_forwards` (rows
            through the denoiser) or `seconds` of training. What a step costs is measured; a method
            whose steps cost nothing in this unit takes the steps of its configuration.
        amount: how many of them.
    """

    unit: BudgetUnit = "steps"
    amount: float = 100.0


@dataclass(kw_only=True)
class MethodConfig:
    """One method of a comparison.

    Attributes:
        name: its label, and its folder.
        train: the command after `mmalign train`, such as `d3po`.
        config: packaged configuration or YAML file of that command.
        pairs: packaged configuration or YAML file of `pairs build`; pairs are built from it first,
            once per seed, and count into the cost.
        options: further options of the training command, dotted names allowed.
        pairs_options: further options of `pairs build`.
    """

    name: str = ""
    train: str = ""
    config: str | None = None
    pairs: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    pairs_options: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class CompareConfig:
    """Several methods over several seeds at one budget, evaluated alike.

    Attributes:
        output_dir: folder of all runs, `<name>/seed-<s>` each, and of the results.
        seeds: number of seeds, counted from 0.
        budget: what every run may spend on training.
        methods: what is compared.
        model: model of every method and of all pairs; leave it out where methods train different
            kinds of models.
        prompts: training prompts of every online method and of all pairs.
        evaluation: options of every method's `evaluation`, such as `num_prompts`.
        options: options of every training command.
        curve_points: evaluations along training, for the curves; 0 leaves them out.
        processes: runs at a time; each gets an equal share of the threads.
    """

    output_dir: str = "runs/compare"
    seeds: int = 3
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    methods: list[MethodConfig] = field(default_factory=list)
    model: str | None = None
    prompts: str | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    curve_points: int = 4
    processes: int = 1
