"""Score a folder of images with one or more rewards."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm

from mmalign.config import RewardConfig
from mmalign.data.files import atomic_path, read_jsonl, resolve_inside
from mmalign.data.images import SUFFIXES, open_image
from mmalign.data.prompts import read_prompts
from mmalign.data.schema import RowError, read_prompt
from mmalign.pipelines._evaluation import resolve_device
from mmalign.rewards import load_rewards
from mmalign.rewards.combine import unique_names
from mmalign.scoring import score_samples
from mmalign.types import ImageRef, InputError

if TYPE_CHECKING:
    from mmalign.config import ScoreConfig

logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """An image to score."""

    file_name: str
    path: Path
    prompt: str


def run(config: ScoreConfig) -> None:
    """Score every image and write `file_name`, `prompt` and one column per reward.

    Images are scored at their own size, so only neighbors of the same size share a batch.

    Raises:
        InputError: for missing files, counts that differ, unreadable images under `stop`, or a bad
            score.
    """
    configs = _reward_configs(config)
    rows = list_rows(Path(config.images).expanduser(), Path(config.prompts).expanduser())
    device = resolve_device("auto")
    loaded = load_rewards(configs, device)
    rewards = dict(zip(unique_names(loaded), (reward for reward, _ in loaded), strict=True))
    kept: list[Row] = []
    columns: dict[str, list[float]] = {name: [] for name in rewards}
    with torch.no_grad(), tqdm(total=len(rows), desc="score", unit="image") as bar:
        for batch, images in _batches(rows, config, bar):
            prompts, names = [row.prompt for row in batch], [row.file_name for row in batch]
            for name, reward in rewards.items():
                columns[name] += score_samples(reward, images.to(device), prompts, names).tolist()
            kept += batch
    if not kept:
        raise InputError(f"none of the {len(rows)} images in {config.images} can be read")
    _write(Path(config.output).expanduser(), kept, columns)
    tqdm.write(summary_table(columns))
    skipped = len(rows) - len(kept)
    tqdm.write(f"{len(kept)} images scored, {skipped} skipped: {config.output}")


def list_rows(images: Path, prompts: Path) -> list[Row]:
    """Match images to prompts.

    A `.jsonl` file names each image (`file_name`, relative to the folder, and `prompt`); any other
    file has one prompt per line for the folder's images in sorted order.

    Raises:
        InputError: if the folder, a file or a key is missing, if counts differ, or if a path leads
            out of the folder.
    """
    if not images.is_dir():
        raise InputError(f"images folder {images} does not exist")
    if prompts.suffix == ".jsonl" and prompts.is_file():
        rows = list(_named_rows(images, prompts))
        if not rows:
            raise InputError(f"{prompts} is empty: give lines with file_name and prompt")
        return rows
    names = sorted(item.name for item in images.iterdir() if item.suffix.lower() in SUFFIXES)
    texts = read_prompts(prompts)
    if len(names) != len(texts):
        raise InputError(
            f"{images} has {len(names)} images but {prompts} has {len(texts)} prompts: give one "
            "line per image in sorted order, or a .jsonl with file_name and prompt"
        )
    return [Row(name, _inside(images, name), text) for name, text in zip(names, texts, strict=True)]


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


def _named_rows(images: Path, prompts: Path) -> Iterator[Row]:
    for number, record in read_jsonl(prompts):
        try:
            if isinstance(record, RowError):
                raise record
            name = record.get("file_name")
            yield Row(str(name), resolve_inside(images, name), read_prompt(record))
        except RowError as error:
            raise InputError(f"{prompts} line {number}: {error}") from error


def _inside(images: Path, name: str) -> Path:
    try:
        return resolve_inside(images, name)
    except RowError as error:
        raise InputError(str(error)) from error


def _batches(
    rows: Sequence[Row], config: ScoreConfig, bar: tqdm[NoReturn]
) -> Iterator[tuple[list[Row], torch.Tensor]]:
    batch: list[Row] = []
    images: list[torch.Tensor] = []
    for row in rows:
        bar.update()
        try:
            image = _read(row, config.max_pixels)
        except InputError as error:
            if config.on_bad_row == "stop":
                raise
            logger.warning("skipped: %s", error)
            continue
        if batch and (len(batch) == config.batch_size or image.shape != images[0].shape):
            yield batch, torch.stack(images)
            batch, images = [], []
        batch.append(row)
        images.append(image)
    if batch:
        yield batch, torch.stack(images)


def _read(row: Row, max_pixels: int) -> torch.Tensor:
    image = open_image(ImageRef(row.path, str(row.path)), max_pixels=max_pixels)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _write(path: Path, rows: Sequence[Row], columns: dict[str, list[float]]) -> None:
    table = pa.table(
        {
            "file_name": [row.file_name for row in rows],
            "prompt": [row.prompt for row in rows],
            **columns,
        }
    )
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)
