"""Pairs from webdataset shards of candidates: one shard of pairs for each.

The candidates of a prompt have to be in the same shard. Scores and places of a shard's images are
held, their bytes are not: those of the pairs are read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from mmalign.config import PairsConfig, as_path
from mmalign.data.files import list_shards
from mmalign.data.schema import BadRow, content_hash
from mmalign.data.selection import select_pairs
from mmalign.data.webdataset import Member, WebdatasetPairs
from mmalign.data.writers import write_shard
from mmalign.pipelines._image_batches import refuse_sets
from mmalign.pipelines._shards import Record, Share, batches, go_through
from mmalign.rewards.combine import combine_scores
from mmalign.scoring import BatchedReward
from mmalign.types import InputError, PreferencePair

if TYPE_CHECKING:
    from mmalign.config import PairsBuildConfig
    from mmalign.pipelines._scores import Scorer

MAX_PIXELS = PairsConfig().max_pixels


class Scored(NamedTuple):
    """A candidate: where it is, the hash of its bytes, and its score by reward."""

    key: str
    prompt: str
    member: Member
    digest: bytes
    scores: tuple[float, ...]


def pair_shards(config: PairsBuildConfig, scorer: Scorer) -> tuple[list[Record] | None, Share]:
    """Pair the candidates of this process's shards.

    Returns:
        A record per shard (`rows`, `skipped`, `pairs`, `prompts_without`), None as long as other
        processes have not done theirs; and this process's share.

    Raises:
        InputError: for options that need all scores at once, shards that cannot be read, bad rows
            under `stop`, or a bad score.
    """
    for key, reward in scorer.configs.items():
        if reward.normalize == "zscore":
            raise InputError(
                f"rewards: {key} is normalized over all scores, which shards never see together;"
                " use prompt_zscore, prompt_rank or none"
            )
    shards = list_shards(str(config.images))
    output = as_path(config.output)

    @cache
    def rewards() -> dict[str, BatchedReward]:
        return {name: BatchedReward(reward) for name, reward in scorer.load().items()}

    def work(shard: Path, advance: Callable[[int], object]) -> Record:
        bad: list[BadRow] = []
        found = _score(config, shard, scorer, rewards(), bad, advance)
        groups = _groups(found, scorer)
        pairs = list(_pairs(config, groups))
        if pairs:
            write_shard(_read(shard, pairs), output / shard.name)
        paired = {group[0].prompt for group, *_ in pairs}
        return {
            "rows": len(found),
            "skipped": len(bad),
            "pairs": len(pairs),
            "prompts_without": len(groups) - len(paired),
        }

    settings = {
        "rewards": [[c.name, c.options, c.weight, c.normalize] for c in scorer.configs.values()],
        **{name: getattr(config, name) for name in ("rule", "min_gap", "top_k")},
    }
    share = Share.of(config.shard, config.num_shards)
    return go_through(shards, output, settings, share, work), share


Group = tuple[list[Scored], list[float]]
"""The distinct candidates of a prompt, with their combined scores."""


def _score(
    config: PairsBuildConfig,
    shard: Path,
    scorer: Scorer,
    rewards: Mapping[str, BatchedReward],
    bad: list[BadRow],
    advance: Callable[[int], object],
) -> list[Scored]:
    refuse_sets(rewards)
    found: list[Scored] = []
    size = min(config.batch_size for config in scorer.configs.values())
    with torch.no_grad():
        for rows, images in batches(
            shard, size=size, max_pixels=MAX_PIXELS, on_bad_row=config.on_bad_row, bad=bad
        ):
            prompts, names = [row.prompt for row in rows], [row.image.where for row in rows]
            samples = images.to(scorer.device)
            columns = [
                reward(samples, prompts, names).double().tolist() for reward in rewards.values()
            ]
            for row, *scores in zip(rows, *columns, strict=True):
                assert isinstance(row.image.data, bytes)
                digest = content_hash(row.image.data)
                found.append(Scored(row.key, row.prompt, row.member, digest, tuple(scores)))
            advance(len(rows))
    return found


def _groups(found: Sequence[Scored], scorer: Scorer) -> list[Group]:
    """Combine the rewards, and gather the candidates of each prompt; a picture counts once."""
    if not found:
        return []
    columns = torch.tensor([row.scores for row in found], dtype=torch.float64).T
    raw = dict(zip(scorer.configs, columns, strict=True))
    totals = combine_scores(raw, scorer.configs, [row.prompt for row in found]).total.tolist()
    groups: dict[str, dict[bytes, tuple[Scored, float]]] = {}
    for row, total in zip(found, totals, strict=True):
        groups.setdefault(row.prompt, {}).setdefault(row.digest, (row, total))
    return [([r for r, _ in g.values()], [t for _, t in g.values()]) for g in groups.values()]


def _pairs(
    config: PairsBuildConfig, groups: Sequence[Group]
) -> Iterator[tuple[list[Scored], list[float], int, int]]:
    for rows, totals in groups:
        chosen = select_pairs(totals, rule=config.rule, min_gap=config.min_gap, top_k=config.top_k)
        for best, worst in chosen:
            yield rows, totals, best, worst


def _read(
    shard: Path, pairs: Sequence[tuple[list[Scored], list[float], int, int]]
) -> Iterator[PreferencePair]:
    source = WebdatasetPairs([shard])
    for rows, totals, best, worst in pairs:
        yield PreferencePair(
            pair_id=f"{shard.stem}/{rows[best].key}/{rows[worst].key}",
            prompt=rows[best].prompt,
            chosen=source.image(rows[best].member),
            rejected=source.image(rows[worst].member),
            score_chosen=totals[best],
            score_rejected=totals[worst],
            margin=totals[best] - totals[worst],
        )
