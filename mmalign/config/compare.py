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
from mmalign.config.parts import TrainConfig
from mmalign.config.vlm import VlmDpoConfig

BudgetUnit = Literal["steps", "reward_queries", "unet_forwards", "tokens_forward", "seconds"]
TRAIN_CONFIGS: Mapping[str, type[TrainConfig]] = {
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
    "vlm-dpo": VlmDpoConfig,
}
"""The training commands that can be compared, `mmalign train NAME`.

Not `online-dpo`: its rounds are runs of their own, each with its own cost.
"""


@dataclass(kw_only=True)
class BudgetConfig:
    """What every run may spend, pairs built for it included.

    Attributes:
        unit: `steps` (optimizer steps), `seconds` of training, `reward_queries` (images scored) and
            `unet_forwards` (rows through the denoiser) for image generators, or `tokens_forward`
            (through the language model, without those of pairs) for vision-language models. What a
            step costs is measured; a method whose steps cost nothing in this unit takes the steps
            of its configuration.
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
        pairs: packaged configuration or YAML file of `pairs build`, or for `vlm-dpo` of
            `pairs topics`; pairs are built from it first, once per seed, and count into the cost.
        options: further options of the training command, dotted names allowed.
        pairs_options: further options of the command that builds the pairs.
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
        prompts: training prompts of every online method and of all pairs; questions of
            vision-language models. `{seed}` in it stands for the seed.
        evaluation: options of every image method's `evaluation`, such as `num_prompts`.
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
