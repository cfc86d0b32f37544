"""Pairs from webdataset shards of candidates: one shard of pairs, and a table of scores, for each.

The candidates of a prompt have to be in the same shard. Scores and places of a shard's images are
held, their bytes are not: those of the pairs are read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from mmalign.config import PairsConfig, as_path
from mmalign.data.files import atomic_path, list_shards
from mmalign.data.schema import BadRow, content_hash
from mmalign.data.selection import select_pairs
from mmalign.data.webdataset import Member, WebdatasetPairs
from mmalign.data.writers import write_shard
from mmalign.pipelines._pairing import scores_of_each
from mmalign.pipelines._shard_table import FILE_NAME, PROMPT, ShardTable, escaped
from mmalign.pipelines._shards import Record, Seen, Share, batches, go_through
from mmalign.rewards.combine import combine_scores
from mmalign.types import InputError, PreferencePair

if TYPE_CHECKING:
    from mmalign.config import PairsBuildConfig, RewardConfig
    from mmalign.pipelines._shard_rewards import ShardRewards

MAX_PIXELS = PairsConfig().max_pixels
SCORES = "scores"
TOTAL = "score"


class Scored(NamedTuple):
    """A candidate: where it is, the hash of its bytes, and its score by reward."""

    key: str
    prompt: str
    member: Member
    digest: bytes
    scores: tuple[float, ...]


def pair_shards(
    config: PairsBuildConfig, configs: Mapping[str, RewardConfig], rewards: ShardRewards
) -> tuple[list[Record] | None, Share]:
    """Pair the candidates of this process's shards.

    Args:
        config: shards, output, and the rule of pairing.
        configs: of the rewards, by key.
        rewards: score the candidates; same keys.

    Returns:
        A record per shard (`rows`, `skipped`, `pairs`, `prompts_without`), None as long as other
        processes have not done theirs; and this process's share.

    Raises:
        InputError: for shards that cannot be read or are in the output folder, bad rows under
            `stop`, or a bad score.
    """
    shards = list_shards(str(config.images))
    output = as_path(config.output)
    if any(shard.resolve().parent == output.resolve() for shard in shards):
        raise InputError(f"output: {output} has the shards themselves: choose another folder")
    size = min(c.batch_size for c in configs.values())

    def work(shard: Path, seen: Seen, advance: Callable[[int], object]) -> Record:
        bad: list[BadRow] = []
        with rewards.shard(seen.hash):
            found = _score(config, shard, rewards, size, bad, advance)
        totals = _totals(config, configs, found)
        _write_scores(output / SCORES / f"{shard.stem}.parquet", configs, found, totals)
        groups = _groups(found, totals)
        pairs = list(_pairs(config, configs, groups))
        if pairs:
            write_shard(_read(shard, pairs), output / shard.name)
        else:
            (output / shard.name).unlink(missing_ok=True)  # of the shard as it once was
        paired = {pair.group.rows[0].prompt for pair in pairs}
        return {
            "rows": len(found),
            "skipped": len(bad),
            "pairs": len(pairs),
            "prompts_without": len(groups) - len(paired),
        }

    share = Share.of(config.shard, config.num_shards)
    return go_through(shards, output, _settings(config, configs, rewards), share, work), share


def _settings(
    config: PairsBuildConfig, configs: Mapping[str, RewardConfig], rewards: ShardRewards
) -> Record:
    """Name all that the pairs of a shard depend on."""
    used = {
        key: {
            **{name: getattr(c, name) for name in ("weight", "normalize", "eval_only")},
            **rewards.identities[key],
        }
        for key, c in configs.items()
    }
    rules = {name: getattr(config, name) for name in ("combine", "rule", "min_gap", "top_k")}
    return {"job": "pairs build", **rules, "rewards": used}


class Group(NamedTuple):
    """The distinct candidates of a prompt, with their combined scores."""

    rows: list[Scored]
    totals: list[float]


class Pair(NamedTuple):
    """Places of the chosen and the rejected candidate in their group."""

    group: Group
    best: int
    worst: int


def refuse_whole(config: PairsBuildConfig, rewards: Mapping[str, RewardConfig]) -> None:
    """Refuse what normalizes over the scores of all shards.

    Raises:
        InputError: for a combination or a reward that does.
    """
    if config.combine == "gdpo":
        raise InputError(
            "combine: gdpo is normalized over all scores, which shards never see together;"
            " use zscore, rank or sum"
        )
    for key, reward in rewards.items():
        if reward.normalize == "zscore" and not reward.eval_only:
            raise InputError(
                f"rewards: {key} is normalized over all scores, which shards never see together;"
                " use prompt_zscore, prompt_rank or none"
            )


def _score(
    config: PairsBuildConfig,
    shard: Path,
    rewards: ShardRewards,
    size: int,
    bad: list[BadRow],
    advance: Callable[[int], object],
) -> list[Scored]:
    found: list[Scored] = []
    for rows, images in batches(
        shard, size=size, max_pixels=MAX_PIXELS, on_bad_row=config.on_bad_row, bad=bad
    ):
        prompts, names = [row.prompt for row in rows], [row.image.where for row in rows]
        columns = rewards(images, prompts, names).values()
        for row, *scores in zip(rows, *columns, strict=True):
            assert isinstance(row.image.data, bytes)
            digest = content_hash(row.image.data)
            found.append(Scored(row.key, row.prompt, row.member, digest, tuple(scores)))
        advance(len(rows))
    return found


def _totals(
    config: PairsBuildConfig, configs: Mapping[str, RewardConfig], found: Sequence[Scored]
) -> list[float]:
    """Combine the rewards of every candidate."""
    if not found:
        return []
    columns = torch.tensor([row.scores for row in found], dtype=torch.float64).T
    raw = dict(zip(configs, columns, strict=True))
    prompts = [row.prompt for row in found]
    return combine_scores(raw, configs, prompts, config.combine).total.tolist()


def _write_scores(
    file: Path, rewards: Iterable[str], found: Sequence[Scored], totals: Sequence[float]
) -> None:
    """Write the scores of every candidate, those by rewards that choose no pair included."""
    names = [TOTAL, *rewards]
    with atomic_path(file) as temporary, ShardTable(temporary, names) as table:
        for row, total in zip(found, totals, strict=True):
            scores = {
                name: [score] for name, score in zip(names, (total, *row.scores), strict=True)
            }
            table.add({FILE_NAME: [row.member.name], PROMPT: [row.prompt], **scores})


def _groups(found: Sequence[Scored], totals: Sequence[float]) -> list[Group]:
    """Gather the candidates of each prompt; a picture counts once."""
    groups: dict[str, dict[bytes, tuple[Scored, float]]] = {}
    for row, total in zip(found, totals, strict=True):
        groups.setdefault(row.prompt, {}).setdefault(row.digest, (row, total))
    return [Group([r for r, _ in g.values()], [t for _, t in g.values()]) for g in groups.values()]


def _pairs(
    config: PairsBuildConfig, rewards: Mapping[str, RewardConfig], groups: Sequence[Group]
) -> Iterator[Pair]:
    for group in groups:
        raw = dict(zip(rewards, zip(*(row.scores for row in group.rows), strict=True), strict=True))
        chosen = select_pairs(
            group.totals,
            rule=config.rule,
            min_gap=config.min_gap,
            top_k=config.top_k,
            each=scores_of_each(rewards, raw),
        )
        for best, worst in chosen:
            yield Pair(group, best, worst)


def _read(shard: Path, pairs: Sequence[Pair]) -> Iterator[PreferencePair]:
    source = WebdatasetPairs([shard])
    for (rows, totals), best, worst in pairs:
        yield PreferencePair(
            pair_id=escaped(f"{shard.stem}/{rows[best].key}/{rows[worst].key}"),
            prompt=rows[best].prompt,
            chosen=source.image(rows[best].member),
            rejected=source.image(rows[worst].member),
            score_chosen=totals[best],
            score_rejected=totals[worst],
            margin=totals[best] - totals[worst],
        )
