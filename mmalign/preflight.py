"""Checks of a configuration that are quick and need no model, before anything heavy is imported."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmalign.config import (
    TRACKERS,
    BenchmarkConfig,
    DiffusionKtoConfig,
    DroConfig,
    EvalConfig,
    GenerateConfig,
    MapoConfig,
    OfflineConfig,
    OnlineConfig,
    OnlineDpoConfig,
    PairsBuildConfig,
    PreferenceConfig,
    RunConfig,
    ScoreConfig,
    ShapesPicturesConfig,
    TrainConfig,
    VlmDpoConfig,
    as_path,
    how_to_install,
    is_installed,
)
from mmalign.config.losses import check_constants, refuse_preference
from mmalign.data.files import is_shards
from mmalign.types import InputError

_INF = math.inf
RANGES: Mapping[str, tuple[float, float]] = {
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, _INF),
    "amount": (0, _INF),
    "anchor_weight": (0, _INF),
    "backprop_steps": (1, _INF),
    "batch_size": (1, _INF),
    "beta": (0, _INF),
    "candidates": (2, _INF),
    "candidates_per_prompt": (2, _INF),
    "caption_dropout": (0, 1),
    "chunk": (1, _INF),
    "count": (1, _INF),
    "clip_range": (0, 1),
    "concurrency": (1, _INF),
    "curve_points": (0, _INF),
    "curve_prompts": (1, _INF),
    "ddp_timeout": (1, _INF),
    "decode_batch_size": (1, _INF),
    "divergence_weight": (0, _INF),
    "early_stopping_patience": (1, _INF),
    "ema_decay": (0, 1),
    "eta": (0, 1),
    "every_steps": (0, _INF),
    "examples": (0, _INF),
    "first_trained_step": (0, _INF),
    "gradient_accumulation_steps": (1, _INF),
    "guidance_step_size": (0, _INF),
    "height": (8, _INF),
    "image_cache_mib": (0, _INF),
    "images_per_prompt": (1, _INF),
    "kl_weight": (0, _INF),
    "label_smoothing": (0, 0.5),
    "learning_rate": (0, _INF),
    "limit": (1, _INF),
    "logging_steps": (1, _INF),
    "logits_chunk": (1, _INF),
    "loser_cap": (0, _INF),
    "louvain_resolution": (0, _INF),
    "max_facts": (1, _INF),
    "max_grad_norm": (0, _INF),
    "max_images": (1, _INF),
    "max_length": (1, _INF),
    "max_new_tokens": (1, _INF),
    "max_body_mib": (1, _INF),
    "max_pixels": (1, _INF),
    "max_samples": (1, _INF),
    "max_steps": (1, _INF),
    "max_tokens": (1, _INF),
    "max_total_pixels": (1, _INF),
    "max_words": (1, _INF),
    "min_gap": (0, _INF),
    "min_topics": (1, _INF),
    "num_buckets": (1, _INF),
    "num_answers": (0, _INF),
    "num_beams": (1, _INF),
    "num_ddim_timesteps": (1, _INF),
    "num_draws": (0, _INF),
    "num_inference_steps": (1, _INF),
    "num_lv_samples": (0, _INF),
    "num_prompts": (1, _INF),
    "num_shards": (1, _INF),
    "num_workers": (0, _INF),
    "page_questions": (0, _INF),
    "pairs_per_prompt": (1, _INF),
    "people": (1, _INF),
    "per_device_train_batch_size": (1, _INF),
    "port": (0, 65535),
    "processes": (1, _INF),
    "queue": (1, _INF),
    "rank": (1, _INF),
    "reference_decay": (0, 1),
    "reference_update_steps": (1, _INF),
    "resamples": (0, _INF),
    "resolution": (8, _INF),
    "responses": (2, _INF),
    "retries": (0, _INF),
    "rounds": (1, _INF),
    "save_steps": (0, _INF),
    "save_total_limit": (1, _INF),
    "seed": (0, 2**63 - 1),
    "seeds": (1, _INF),
    "shard": (0, _INF),
    "similarity_score": (0, 1),
    "stage_steps": (1, _INF),
    "temperature": (0, _INF),
    "step": (0, 1),
    "threshold": (-1, 1),
    "timeout": (0, _INF),
    "top_k": (2, _INF),
    "top_p": (0, 1),
    "train_steps": (1, _INF),
    "warmup_share": (0, 1),
    "warmup_steps": (0, _INF),
    "weight_decay": (0, _INF),
    "width": (8, _INF),
    "window": (0, 1),
    "yes_no_batch_size": (1, _INF),
}
"""Inclusive bounds by the last part of an option's name."""
INPUT_PATHS = {
    *("path", "prompts", "images", "responses", "labels", "annotations", "vocabulary"),
    *("questions", "reviews"),
}
MODELS = {"model", "adapter", "base_adapter", "teacher"}
OUTPUT_PATHS = {"output_dir", "output", "cache_dir", "cache"}
_WRITE_FOLDERS = (
    GenerateConfig,
    PairsBuildConfig,
    ShapesPicturesConfig,
)  # else `output` may be a file
_OWN_LOSSES: Mapping[type[OfflineConfig], str] = {
    DiffusionKtoConfig: "diffusion-kto",
    DroConfig: "dro",
    MapoConfig: "mapo",
}
"""Methods that take pairs and use no preference loss."""
PREVIEW_ROWS = 64
"""Pairs looked at before training; the rest follows when the pipeline reads them all."""


def check_config(config: object) -> None:
    """Check values, paths and the state of the output folder.

    Raises:
        InputError: the first thing that is wrong, with the option's name.
    """
    for name, value in _options(config, ""):
        leaf = name.rpartition(".")[2]
        if isinstance(value, int | float) and not isinstance(value, bool):
            _check_number(name, value, *RANGES.get(leaf, (-_INF, _INF)))
        elif _comes_otherwise(config, name, value):
            continue
        elif isinstance(value, str) and leaf in INPUT_PATHS:
            _check_input(name, value)
        elif isinstance(value, str) and leaf in MODELS:
            _check_model(name, value)
        elif isinstance(value, str) and leaf in OUTPUT_PATHS:
            is_file = leaf == "output" and not isinstance(config, _WRITE_FOLDERS)
            _check_output(name, value, is_file=is_file)
    _check_shard(getattr(config, "shard", 0), getattr(config, "num_shards", 1))
    if isinstance(config, BenchmarkConfig):
        _check_number("resamples", config.resamples, 1, _INF)  # topic overwriting may do without
    _check_loss(config)
    if isinstance(config, TrainConfig):
        _check_resume(config)
        _check_trackers(config.report_to)
    if isinstance(config, RunConfig):
        _check_evaluation(config.evaluation)
    _check_contents(config)


def _comes_otherwise(config: object, name: str, value: object) -> bool:
    """Tell whether a command does without an option that others need."""
    if name == "pairs.path":
        return isinstance(config, OnlineDpoConfig)  # every round makes its own pairs
    if value:
        return False
    # Answers bring their prompts and name their images; images of a shard bring their prompts.
    if isinstance(config, ScoreConfig | PairsBuildConfig) and config.responses is not None:
        return name in ("images", "prompts")
    return name == "prompts" and is_shards(getattr(config, "images", None))


def _options(config: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        items = value if isinstance(value, list) else [value]
        for i, item in enumerate(items):
            place = f"{name}[{i}]" if isinstance(value, list) else name
            if dataclasses.is_dataclass(item):
                yield from _options(item, f"{place}.")
            else:
                yield place, item


def _check_number(name: str, value: float, low: float, high: float) -> None:
    if not math.isfinite(value):
        raise InputError(f"{name}: must be a finite number, got {value}")
    if not low <= value <= high:
        bound = f"at least {low:g}" if high == _INF else f"between {low:g} and {high:g}"
        raise InputError(f"{name}: must be {bound}, got {value:g}")


def _check_shard(shard: int, num_shards: int) -> None:
    if shard >= num_shards:
        raise InputError(f"shard: {shard} must be below num_shards, which is {num_shards}")


def _check_input(name: str, value: str) -> None:
    if not value:
        raise InputError(f"{name}: is required")
    pattern = any(character in value for character in "*?[{")  # shards
    if not pattern and not as_path(value).exists():
        raise InputError(f"{name}: no such file or folder: {value}")


def _check_model(name: str, value: str) -> None:
    """A local path must exist; `owner/name` may be a hub id, which only the loader can tell."""
    local = value.startswith(("pkg://", ".", "~", os.sep)) or value.count("/") > 1
    if local and not as_path(value).exists():
        raise InputError(f"{name}: no such file or folder: {value}")


def _check_output(name: str, value: str, *, is_file: bool) -> None:
    path = as_path(value).absolute()
    existing = next(p for p in (path, *path.parents) if p.exists())
    if not existing.is_dir() and not (is_file and existing == path):
        raise InputError(f"{name}: {existing} is a file, so {value} cannot be created")
    folder = existing if existing.is_dir() else existing.parent
    try:  # permissions do not tell: root passes them, and file systems have rules of their own
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        so = "" if folder == path else f", so {value} cannot be created"
        problem = f"{folder} is not writable ({error.strerror}){so}"
        raise InputError(f"{name}: {problem}") from error


def _check_loss(config: object) -> None:
    """Refuse what the method would ignore; presets are looked at when they are resolved."""
    if not isinstance(config, PreferenceConfig):
        return
    for method, name in _OWN_LOSSES.items():
        if isinstance(config, method):
            refuse_preference(name, config)
    check_constants(config, texts=isinstance(config, VlmDpoConfig))


def _check_resume(config: TrainConfig) -> None:
    wanted = config.resume_from_checkpoint
    if wanted is not None and wanted != "latest" and not as_path(wanted).is_dir():
        raise InputError(f"resume_from_checkpoint: no such folder: {wanted}")
    folder = Path(config.output_dir) / "checkpoints"
    if wanted is None and any(folder.glob("checkpoint-*")):
        raise InputError(
            f"output_dir: {folder} holds checkpoints of an earlier run; continue it with"
            " --resume_from_checkpoint latest, or choose another --output_dir"
        )


def _check_trackers(names: list[str]) -> None:
    """Accelerate's other trackers and wrong names are found when the accelerator is made."""
    for name in names:
        if name in TRACKERS and not is_installed(name):
            raise InputError(f"report_to: {name} is not installed; {how_to_install(name)}")


def _check_evaluation(config: EvalConfig) -> None:
    for name in ("every_steps", "early_stopping_metric"):
        if getattr(config, name) and config.prompts is None:
            raise InputError(f"evaluation.{name}: needs evaluation.prompts")
    if config.early_stopping_metric is not None and not config.every_steps:
        raise InputError("evaluation.early_stopping_metric: needs evaluation.every_steps above 0")


def _check_contents(config: object) -> None:
    """Read prompts and the first pairs: most bad files are bad from the start."""
    evaluation = getattr(config, "evaluation", None)
    _check_prompts(getattr(evaluation, "prompts", None))
    if isinstance(config, GenerateConfig | OnlineConfig) or (
        isinstance(config, PairsBuildConfig) and config.images is None and not config.responses
    ):
        _check_prompts(config.prompts)
    if isinstance(config, OnlineDpoConfig):
        _check_prompts(config.candidates.prompts)
    elif isinstance(config, VlmDpoConfig):
        _check_answers(config)
    elif isinstance(config, OfflineConfig) and config.pairs.on_bad_row == "stop":
        from mmalign.data.readers import read_pairs

        limit = min(config.pairs.limit or PREVIEW_ROWS, PREVIEW_ROWS)
        read_pairs(dataclasses.replace(config.pairs, limit=limit))


def _check_answers(config: VlmDpoConfig) -> None:
    from mmalign.data.vlm_readers import read_vlm_pairs

    if not config.model:
        raise InputError("model: is required: a folder in transformers' format or a hub id")
    if config.pairs.on_bad_row == "stop":
        limit = min(config.pairs.limit or PREVIEW_ROWS, PREVIEW_ROWS)
        read_vlm_pairs(dataclasses.replace(config.pairs, limit=limit))


def _check_prompts(path: str | None) -> None:
    if path is not None:
        from mmalign.data.prompts import read_prompts

        read_prompts(path)
