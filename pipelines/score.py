"""Score a folder of images, or a file of answers, with one or more rewards."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm

from mmalign.config import RewardConfig
from mmalign.data.files import atomic_path, is_shards, write_jsonl
from mmalign.data.folders import METADATA
from mmalign.data.images import open_image, to_tensor
from mmalign.data.listing import NamedImage, list_images
from mmalign.pipelines._cached import cached_rewards, hits, saved
from mmalign.pipelines._evaluation import resolve_device
from mmalign.pipelines._image_batches import image_batches, that_score_sets
from mmalign.pipelines._responses import SCORES, read_responses, score_responses
from mmalign.pipelines._score_shards import score_shards
from mmalign.types import ImageRef, InputError

if TYPE_CHECKING:
    from mmalign.config import ScoreConfig

T = TypeVar("T")
logger = logging.getLogger(__name__)


def run(config: ScoreConfig) -> None:
    """Score every image and write `file_name`, `prompt` and one column per reward.

    With `responses` answers are scored instead, by rewards of answers.
    Shards of images are scored shard by shard: `mmalign.pipelines._score_shards`.

    Images are scored at their own size, so only neighbors of the same size share a batch. A reward
    that compares the images of a prompt gets all of them in one call.

    Raises:
        InputError: for missing files, counts that differ, unreadable images under `stop`, or a bad
            score.
    """
    configs = _reward_configs(config)
    if config.responses is not None:
        _score_responses(config, configs)
        return
    if is_shards(config.images):
        score_shards(config, configs)
        return
    rows = list_images(Path(config.images).expanduser(), _prompt_file(config))
    device = resolve_device("auto")
    rewards = cached_rewards(configs, config.cache, device)
    scores: dict[str, dict[int, float]] = {name: {} for name in rewards}
    with saved(rewards), tqdm(total=len(rows), desc="score", unit="image") as bar:
        for batch, images in image_batches(
            [row.prompt for row in rows],
            lambda number: _read(rows[number], config, bar),
            config.batch_size,
            that_score_sets(rewards),
        ):
            prompts, names = zip(*((rows[n].prompt, rows[n].file_name) for n in batch), strict=True)
            for name, reward in rewards.items():
                found = reward(images.to(device), prompts, names)
                scores[name].update(zip(batch, found, strict=True))
            bar.update(len(batch))
    numbers = sorted(next(iter(scores.values())))
    if not numbers:
        raise InputError(f"none of the {len(rows)} images in {config.images} can be read")
    kept = [rows[number] for number in numbers]
    columns = {name: [own[number] for number in numbers] for name, own in scores.items()}
    texts = {
        "file_name": [row.file_name for row in kept],
        "prompt": [row.prompt for row in kept],
    }
    _write(Path(config.output).expanduser(), {**texts, **columns})
    tqdm.write(summary_table(columns))
    skipped = len(rows) - len(kept)
    tqdm.write(f"{len(kept)} images scored, {skipped} skipped{hits(rewards)}: {config.output}")


def summary_table(columns: dict[str, list[float]]) -> str:
    """Lay out mean, extremes and percentiles of every column as lines of text."""
    width = max(len(name) for name in ["reward", *columns])
    heads = ("mean", "min", "p10", "p50", "p90", "max")
    lines = [f"{'reward':<{width}}" + "".join(f"{head:>11}" for head in heads)]
    for name, values in columns.items():
        low, *middle, high = np.percentile(values, [0, 10, 50, 90, 100])
        cells = [np.mean(values), low, *middle, high]
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>11.4g}" for cell in cells))
    return "\n".join(lines)


def _score_responses(config: ScoreConfig, configs: Sequence[RewardConfig]) -> None:
    """Write the rows with their scores as JSON lines, or texts and scores as parquet."""
    output = Path(config.output).expanduser()
    answers = read_responses(
        str(config.responses),
        config.images or None,
        on_bad_row=config.on_bad_row,
        max_pixels=config.max_pixels,
    )
    rewards = cached_rewards(configs, config.cache, resolve_device("auto"), "text")
    with saved(rewards):
        columns = score_responses(answers.rows, rewards)
    if output.suffix == ".jsonl":
        rows = zip(answers.rows, _rows(columns), strict=True)
        try:
            write_jsonl(output, [{**answer.row, SCORES: score} for answer, score in rows])
        except (TypeError, ValueError) as error:  # such as images inside a parquet file
            raise InputError(
                f"output: {config.responses} has what JSON cannot hold ({error}): give a .parquet"
            ) from error
    else:
        texts = {
            "prompt": [answer.prompt for answer in answers.rows],
            "response": [answer.response.text for answer in answers.rows],
        }
        _write(output, {**texts, **columns})
    tqdm.write(summary_table(columns))
    tqdm.write(
        f"{len(answers.rows)} answers scored, {len(answers.bad_rows)} skipped{hits(rewards)}: "
        f"{config.output}"
    )


def _prompt_file(config: ScoreConfig) -> Path:
    """Find the prompts of a folder of images; what `mmalign generate` writes has its own."""
    own = Path(config.images).expanduser() / METADATA
    if config.prompts:
        return Path(config.prompts).expanduser()
    if not own.exists():
        raise InputError("prompts: is required, for a folder of images without metadata.jsonl")
    return own


def _reward_configs(config: ScoreConfig) -> list[RewardConfig]:
    if not config.reward:
        raise InputError("no reward given: use --reward clip, or another name")
    for name in config.options:
        if name not in config.reward:
            nearest = difflib.get_close_matches(name, config.reward, n=1, cutoff=0.0)[0]
            raise InputError(f"options are for reward {name!r}, which is not used: {nearest!r}?")
    return [
        RewardConfig(name=name, options=config.options.get(name, {}), batch_size=config.batch_size)
        for name in config.reward
    ]


def _read(row: NamedImage, config: ScoreConfig, bar: tqdm[NoReturn]) -> torch.Tensor | None:
    ref = ImageRef(row.path, str(row.path))
    try:
        return to_tensor(open_image(ref, max_pixels=config.max_pixels))
    except InputError as error:
        if config.on_bad_row == "stop":
            raise
        logger.warning("skipped: %s", error)
        bar.update()
        return None


def _rows(columns: Mapping[str, Sequence[T]]) -> list[dict[str, T]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _write(path: Path, columns: Mapping[str, Sequence[str] | Sequence[float]]) -> None:
    if path.suffix == ".jsonl":
        write_jsonl(path, _rows(columns))
        return
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(dict(columns)), temporary)
