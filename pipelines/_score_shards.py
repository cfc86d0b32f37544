"""Scores of the images of webdataset shards: one parquet file per shard."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from mmalign.data.files import atomic_path, list_shards
from mmalign.data.schema import BadRow
from mmalign.pipelines._evaluation import resolve_device
from mmalign.pipelines._shard_rewards import ShardRewards
from mmalign.pipelines._shard_table import FILE_NAME, PROMPT, ShardTable
from mmalign.pipelines._shards import Record, Seen, Share, batches, go_through
from mmalign.rewards import load_rewards
from mmalign.rewards.combine import unique_names

if TYPE_CHECKING:
    from mmalign.config import RewardConfig, ScoreConfig

LISTED = 5
logger = logging.getLogger(__name__)


def score_shards(config: ScoreConfig, rewards: Sequence[RewardConfig]) -> None:
    """Score this process's shards; who comes last says what all scores are like.

    Raises:
        InputError: for shards that cannot be read, bad rows under `stop`, or a bad score.
    """
    shards = list_shards(config.images)
    output = Path(config.output).expanduser()
    device = resolve_device("auto")

    loaded = load_rewards(rewards, device)
    found = dict(zip(unique_names(loaded), loaded, strict=True))
    scorer = ShardRewards(found, device, config.cache)

    def work(shard: Path, seen: Seen, advance: Callable[[int], object]) -> Record:
        with scorer.shard(seen.hash):
            return _score(config, shard, output / f"{shard.stem}.parquet", scorer, advance)

    settings = {
        "job": "score",
        "max_pixels": config.max_pixels,
        "rewards": scorer.identities,
    }
    share = Share.of(config.shard, config.num_shards)
    records = go_through(shards, output, settings, share, work)
    if records is None:
        share.report(scorer.said())
        return
    tqdm.write(totals_table(records))
    counts = (sum(record[name] for record in records) for name in ("rows", "skipped"))
    tqdm.write("{} images scored, {} skipped{}: {}".format(*counts, scorer.said(), output))


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
    scorer: ShardRewards,
    advance: Callable[[int], object],
) -> Record:
    """Score a shard into a file; its record has sum, least and largest score by reward."""
    bad: list[BadRow] = []
    stats = {name: [0.0, float("inf"), float("-inf")] for name in scorer.identities}
    count = 0
    with atomic_path(file) as temporary, ShardTable(temporary, scorer.identities) as table:
        for rows, images in batches(
            shard,
            size=config.batch_size,
            max_pixels=config.max_pixels,
            on_bad_row=config.on_bad_row,
            bad=bad,
        ):
            prompts, names = [row.prompt for row in rows], [row.image.where for row in rows]
            columns: dict[str, list[Any]] = {
                FILE_NAME: [row.member.name for row in rows],
                PROMPT: prompts,
            }
            for name, scores in scorer(images, prompts, names).items():
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
