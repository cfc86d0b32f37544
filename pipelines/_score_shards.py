"""Scores of the images of webdataset shards: one parquet file per shard."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm.auto import tqdm

from mmalign.data.files import atomic_path, list_shards
from mmalign.data.schema import BadRow
from mmalign.pipelines._evaluation import resolve_device
from mmalign.pipelines._image_batches import refuse_sets
from mmalign.pipelines._shards import Record, Share, batches, go_through
from mmalign.rewards import load_rewards
from mmalign.rewards.combine import unique_names
from mmalign.scoring import BatchedReward

if TYPE_CHECKING:
    from mmalign.config import RewardConfig, ScoreConfig

LISTED = 5
ROW_GROUP = 8192
logger = logging.getLogger(__name__)


def score_shards(config: ScoreConfig, rewards: Sequence[RewardConfig]) -> None:
    """Score this process's shards; who comes last says what all scores are like.

    Raises:
        InputError: for shards that cannot be read, bad rows under `stop`, or a bad score.
    """
    shards = list_shards(config.images)
    output = Path(config.output).expanduser()
    device = resolve_device("auto")

    @cache
    def loaded() -> dict[str, BatchedReward]:
        found = load_rewards(rewards, device)
        names = unique_names(found)
        return {n: BatchedReward(reward) for n, (reward, _) in zip(names, found, strict=True)}

    def work(shard: Path, advance: Callable[[int], object]) -> Record:
        return _score(config, shard, output / f"{shard.stem}.parquet", loaded(), advance)

    settings = {"rewards": [[r.name, r.options] for r in rewards], "max_pixels": config.max_pixels}
    share = Share.of(config.shard, config.num_shards)
    records = go_through(shards, output, settings, share, work)
    if records is None:
        tqdm.write(f"process {share.process} of {share.processes} is done; others are not yet")
        return
    tqdm.write(totals_table(records))
    counts = (sum(record[name] for record in records) for name in ("rows", "skipped"))
    tqdm.write("{} images scored, {} skipped: {}".format(*counts, output))


def totals_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Lay out mean and extremes of every reward over all shards as lines of text."""
    kept = [record for record in records if record["rows"]]
    names = list(kept[0]["rewards"]) if kept else []
    width = max(len(name) for name in ["reward", *names])
    lines = [f"{'reward':<{width}}" + "".join(f"{head:>11}" for head in ("mean", "min", "max"))]
    rows = sum(record["rows"] for record in kept)
    for name in names:
        sums, lows, highs = zip(*(record["rewards"][name] for record in kept), strict=True)
        cells = (sum(sums) / rows, min(lows), max(highs))
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>11.4g}" for cell in cells))
    return "\n".join(lines)


def _score(
    config: ScoreConfig,
    shard: Path,
    file: Path,
    rewards: Mapping[str, BatchedReward],
    advance: Callable[[int], object],
) -> Record:
    """Score a shard into a file; its record has sum, least and largest score by reward."""
    refuse_sets(rewards)
    device = resolve_device("auto")
    bad: list[BadRow] = []
    stats = {name: [0.0, float("inf"), float("-inf")] for name in rewards}
    text = [("file_name", pa.string()), ("prompt", pa.string())]
    schema = pa.schema([*text, *((name, pa.float64()) for name in rewards)])
    count = 0
    with atomic_path(file) as temporary, _Table(temporary, schema) as table, torch.no_grad():
        for rows, images in batches(
            shard,
            size=config.batch_size,
            max_pixels=config.max_pixels,
            on_bad_row=config.on_bad_row,
            bad=bad,
        ):
            prompts, names = [row.prompt for row in rows], [row.image.where for row in rows]
            columns: dict[str, list[Any]] = {
                "file_name": [row.member.name for row in rows],
                "prompt": prompts,
            }
            for name, reward in rewards.items():
                scores = reward(images.to(device), prompts, names).double().tolist()
                total, low, high = stats[name]
                stats[name] = [total + sum(scores), min(low, *scores), max(high, *scores)]
                columns[name] = scores
            table.add(columns)
            count += len(rows)
            advance(len(rows))
    if bad:
        some = "; ".join(map(str, bad[:LISTED]))
        logger.warning("%s: %d rows skipped, among them: %s", shard, len(bad), some)
    return {"rows": count, "skipped": len(bad), "rewards": stats if count else {}}


class _Table:
    """A parquet file written in row groups, so that a shard of any size takes little memory."""

    def __init__(self, file: Path, schema: pa.Schema) -> None:
        self._writer, self._schema = pq.ParquetWriter(file, schema), schema
        self._columns: dict[str, list[Any]] = {name: [] for name in schema.names}

    def add(self, columns: Mapping[str, Sequence[Any]]) -> None:
        for name, values in columns.items():
            self._columns[name] += values
        if len(self._columns["prompt"]) >= ROW_GROUP:
            self._flush()

    def __enter__(self) -> _Table:
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        self._writer.write_table(pa.table(self._columns, schema=self._schema))
        self._columns = {name: [] for name in self._columns}
