"""What a comparison has to run: commands, folders, and steps within the budget."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

from mmalign.config import (
    EVALUATION_SEED,
    TRAIN_CONFIGS,
    BudgetConfig,
    BudgetUnit,
    CompareConfig,
    MethodConfig,
    OfflineConfig,
    OnlineConfig,
    PairsBuildConfig,
    RunConfig,
    TopicOverwriteConfig,
    TrainConfig,
    VlmDpoConfig,
    as_path,
)
from mmalign.data.prompts import read_prompts
from mmalign.options import parse_options
from mmalign.pipelines._compare_inputs import inputs_of
from mmalign.types import InputError

COST_NAMES = {"seconds": "train_seconds"}
PROBE_STEPS, TIMED_PROBE_STEPS = 2, 8
OWN = ("output_dir", "seed", "sampling.seed", "resume_from_checkpoint", "pairs.path")
WITHOUT_EVALUATION = {
    "evaluation.prompts": None,
    "evaluation.every_steps": 0,
    "evaluation.early_stopping_metric": None,
}
Cost = Mapping[str, float]


class Pairs(NamedTuple):
    """Pairs that a method trains on, before seed and folder are fixed.

    `command` follows `mmalign pairs`; `file` in the folder is what training reads. `inputs` are
    what each seed reads besides its flags.
    """

    method: MethodConfig
    flags: dict[str, Any]
    inputs: list[list[str]]
    command: str = "build"
    place: str = "output"
    seeds: tuple[str, ...] = ("sampling.seed",)
    file: str = ""

    def folder(self, config: CompareConfig, seed: int) -> Path:
        """Name their folder: methods with the same options share it."""
        stem = Path(str(self.method.pairs)).stem
        key = json.dumps(
            [self.method.pairs, self.flags, self.inputs[seed]], sort_keys=True
        ).encode()
        label = f"{stem}-{hashlib.blake2b(key, digest_size=4).hexdigest()}"
        return as_path(config.output_dir) / "pairs" / label / f"seed-{seed}"

    def arguments(self, config: CompareConfig, seed: int) -> list[str]:
        """Say what follows `mmalign pairs`."""
        own = {self.place: str(self.folder(config, seed)), **dict.fromkeys(self.seeds, seed)}
        flags = _of_seed({**self.flags, **own}, seed)
        return [self.command, *_arguments(self.method.pairs, flags)]


class Method(NamedTuple):
    """A method with its checked options."""

    config: MethodConfig
    flags: dict[str, Any]
    parsed: TrainConfig
    pairs: Pairs | None
    pairs_cost: Cost
    inputs: list[list[str]]

    def folder(self, config: CompareConfig, seed: int) -> Path:
        """Name the folder of a run."""
        return as_path(config.output_dir) / self.config.name / f"seed-{seed}"

    def probe_folder(self, config: CompareConfig) -> Path:
        """Name the folder of the run that measures what a step costs."""
        return as_path(config.output_dir) / self.config.name / "probe"

    def probe_arguments(self, config: CompareConfig) -> list[str]:
        """Say what follows `mmalign train` in the probe."""
        steps = TIMED_PROBE_STEPS if config.budget.unit == "seconds" else PROBE_STEPS
        image = isinstance(self.parsed, RunConfig)
        quiet = WITHOUT_EVALUATION if image else {"trial": None, "eval_pairs": None}
        flags = {**self.flags, **quiet, "max_steps": steps, "save_steps": 0}
        return self._arguments(config, 0, self.probe_folder(config), flags)

    def arguments(self, config: CompareConfig, seed: int, max_steps: int) -> list[str]:
        """Say what follows `mmalign train` in a run."""
        flags, parsed = {**self.flags, "max_steps": max_steps}, self.parsed
        curve = isinstance(parsed, RunConfig) and parsed.evaluation.prompts is not None
        if config.curve_points and curve:
            every = max(1, max_steps // config.curve_points)
            flags.setdefault("evaluation.every_steps", every)
        return self._arguments(config, seed, self.folder(config, seed), flags)

    def _arguments(
        self, config: CompareConfig, seed: int, folder: Path, flags: Mapping[str, Any]
    ) -> list[str]:
        own: dict[str, Any] = {
            "output_dir": str(folder),
            "seed": seed,
            "resume_from_checkpoint": "latest",
        }
        if isinstance(self.parsed, RunConfig):
            own["sampling.seed"] = EVALUATION_SEED + seed
        if self.pairs is not None:
            own["pairs.path"] = str(self.pairs.folder(config, seed) / self.pairs.file)
        flags = _of_seed({**flags, **own}, seed)
        return [self.config.train, *_arguments(self.config.config, flags)]


def plan_methods(config: CompareConfig) -> list[Method]:
    """Check every method and put its options together.

    Raises:
        InputError: no methods, a bad or repeated name, an unknown command, or unusable options.
    """
    if not config.methods:
        raise InputError("methods: is required; --config shapes_compare has some")
    names = [method.name for method in config.methods]
    for index, name in enumerate(names):
        if not re.fullmatch(r"\w[\w.+-]*", name) or name == "pairs":
            raise InputError(
                f"methods[{index}].name: {name!r} must be letters, digits, '.', '+', '-' and '_',"
                " and not 'pairs'"
            )
        if name in names[:index]:
            raise InputError(f"methods[{index}].name: {name} is there twice")
    return [_plan(config, method) for method in config.methods]


def affordable_steps(
    budget: BudgetConfig, *, name: str, per_step: Cost, pairs: Cost, own_steps: int
) -> int:
    """Count the optimizer steps that the budget pays for, after the pairs.

    Args:
        budget: unit and amount.
        name: the method, for messages.
        per_step: cost of one step, by the names of `cost` in `summary.json`.
        pairs: cost of the pairs.
        own_steps: what is done when steps cost nothing in this unit.

    Raises:
        InputError: it does not pay for one step, or the method does not count this unit.
    """
    unit = COST_NAMES.get(budget.unit, budget.unit)
    if unit == "steps":
        per, spent = 1.0, 0.0
    elif unit not in per_step:
        known = [u for u in get_args(BudgetUnit) if COST_NAMES.get(u, u) in per_step]
        raise InputError(
            f"budget.unit: {name} does not count {budget.unit}; use steps, {' or '.join(known)}"
        )
    else:
        per, spent = per_step[unit], pairs.get(unit, 0.0)
    left = budget.amount - spent
    steps = own_steps if per == 0 and left >= 0 else math.floor(left / per) if per else 0
    if steps < 1:
        need = f"{spent:g} for its pairs and {per:g} per step" if spent else f"{per:g} per step"
        raise InputError(
            f"budget.amount: {name} needs {need}, and {budget.amount:g} {budget.unit} does not"
            " pay for one step"
        )
    return steps


def check_pairs(budget: BudgetConfig, name: str, pairs: Cost) -> None:
    """Refuse a budget that a method's pairs alone use up, as far as their cost is known.

    Raises:
        InputError: naming the method.
    """
    spent = pairs.get(budget.unit, 0.0)
    if spent >= budget.amount and spent:
        raise InputError(
            f"budget.amount: the pairs of {name} alone need {spent:g} {budget.unit}, of"
            f" {budget.amount:g}; give more, or fewer prompts or candidates in pairs_options"
        )


def pairs_cost(config: PairsBuildConfig) -> dict[str, float]:
    """Count what building pairs costs: every candidate is sampled with guidance and scored once."""
    prompts = len(dict.fromkeys(read_prompts(config.prompts, config.num_prompts)))
    candidates = prompts * config.candidates_per_prompt
    guided = config.sampling.guidance_scale > 1 and not _embeds_guidance(config)
    rows = candidates * config.sampling.num_inference_steps * (2 if guided else 1)
    return {"unet_forwards": float(rows), "reward_queries": float(candidates)}


def _plan(config: CompareConfig, method: MethodConfig) -> Method:
    if method.train not in TRAIN_CONFIGS:
        raise InputError(
            f"methods.{method.name}.train: {method.train!r} is not one of"
            f" {', '.join(TRAIN_CONFIGS)}"
        )
    config_class = TRAIN_CONFIGS[method.train]
    flags = _train_flags(config, method, config_class)
    for name in OWN:
        if name in flags and not (name == "pairs.path" and method.pairs is None):
            raise InputError(f"methods.{method.name}.options: {name} is set by the comparison")
    parsed = _parsed(config_class, method.name, method.config, flags)
    inputs = [inputs_of(parsed, seed) for seed in range(config.seeds)]
    if method.pairs is None:
        return Method(method, flags, parsed, None, {}, inputs)
    if issubclass(config_class, VlmDpoConfig):
        pairs = _topics(config, method)
        return Method(method, flags, parsed, pairs, {}, inputs)
    if not issubclass(config_class, OfflineConfig):
        raise InputError(f"methods.{method.name}.pairs: {method.train} takes no pairs")
    pair_flags = _pair_flags(config, method, "prompts")
    build = _parsed(PairsBuildConfig, method.name, method.pairs, pair_flags)
    pairs = Pairs(method, pair_flags, [inputs_of(build, seed) for seed in range(config.seeds)])
    return Method(method, flags, parsed, pairs, pairs_cost(build), inputs)


def _topics(config: CompareConfig, method: MethodConfig) -> Pairs:
    """Plan pairs of answers; what they cost is known only afterwards, in seconds."""
    flags = _pair_flags(config, method, "questions")
    topics = _parsed(TopicOverwriteConfig, method.name, method.pairs, flags)
    inputs = [inputs_of(topics, seed) for seed in range(config.seeds)]
    seeds = ("seed", "sampling.seed", "resampling.seed")
    return Pairs(method, flags, inputs, "topics", "output_dir", seeds, "pairs.jsonl")


def _pair_flags(config: CompareConfig, method: MethodConfig, prompts: str) -> dict[str, Any]:
    given = {"model": config.model, prompts: config.prompts}
    return {k: v for k, v in given.items() if v is not None} | method.pairs_options


def _of_seed(flags: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Put the seed where texts have `{seed}`."""
    return {
        name: value.replace("{seed}", str(seed)) if isinstance(value, str) else value
        for name, value in flags.items()
    }


def _train_flags(
    config: CompareConfig, method: MethodConfig, config_class: type[TrainConfig]
) -> dict[str, Any]:
    """Merge options: what holds for all, then what the method says."""
    flags: dict[str, Any] = {} if config.model is None else {"model": config.model}
    if config.prompts is not None and issubclass(config_class, OnlineConfig):
        flags["prompts"] = config.prompts
    if issubclass(config_class, RunConfig):
        flags |= {f"evaluation.{name}": value for name, value in config.evaluation.items()}
    return {**flags, **config.options, **method.options}


def _parsed(config_class: type[Any], name: str, file: str | None, flags: Mapping[str, Any]) -> Any:
    try:
        return parse_options(config_class, _arguments(file, flags), command="compare")
    except InputError as error:
        raise InputError(f"methods.{name}: {error}") from error


def _arguments(file: str | None, flags: Mapping[str, Any]) -> list[str]:
    """Write options as flags; everything that is not text goes as JSON."""
    head = [] if file is None else ["--config", file]
    return head + [
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in flags.items()
    ]


def _embeds_guidance(config: PairsBuildConfig) -> bool:
    """Tell a consistency model, whose guidance costs no second row; a hub id needs `family`."""
    if config.family != "auto":
        return config.family == "lcm"
    index = as_path(config.model) / "model_index.json"
    if not index.is_file():
        return False
    name = json.loads(index.read_text("utf-8")).get("_class_name", "")
    return str(name).startswith("LatentConsistencyModel")
