"""`mmalign pairs build`: candidates, their scores, then preference pairs.

The output folder is an imagefolder of pairs (`metadata.jsonl`), with `candidates/`, `scores/`
(logs) and `scores.jsonl` (every candidate). Every stage goes on where an earlier run stopped. With
several processes, number s takes the prompts i with i % num_shards == s, and whoever comes last
writes the pairs: they are a function of all logs in the order of the prompts, the same for any
number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm.auto import tqdm

from mmalign.adapters import load_adapter
from mmalign.config import PairsConfig, RewardConfig, as_path
from mmalign.data.files import is_shards, write_bytes, write_jsonl
from mmalign.data.folders import METADATA
from mmalign.data.images import image_suffix, read_image_bytes
from mmalign.data.readers import PairTable, read_pairs
from mmalign.data.schema import CHOSEN_FILE, REJECTED_FILE, BadRow
from mmalign.data.selection import select_pairs
from mmalign.pipelines._candidates import (
    MAX_PIXELS,
    Candidate,
    Group,
    list_candidates,
    plan_candidates,
    sample_missing,
)
from mmalign.pipelines._evaluation import resolve_device
from mmalign.pipelines._pair_shards import pair_shards, refuse_whole
from mmalign.pipelines._pairing import check_rules, scores_of_each
from mmalign.pipelines._response_pairs import build_response_pairs
from mmalign.pipelines._scores import ScoreLog, Scorer, bad_images, reward_key, score_groups
from mmalign.pipelines._shard_rewards import ShardRewards
from mmalign.processes import launched, world_size
from mmalign.rewards import load_reward
from mmalign.rewards.combine import combine_scores
from mmalign.types import InputError

if TYPE_CHECKING:
    from mmalign.config import Combination, PairsBuildConfig
    from mmalign.types import ImageAdapter, Reward


class Selected(NamedTuple):
    """Rows of `metadata.jsonl`, and the number of prompts without a pair."""

    rows: list[dict[str, Any]]
    prompts_without: int


def run(config: PairsBuildConfig) -> None:
    """Build pairs and say how many.

    Raises:
        InputError: as `build_pairs`, or with answers as `build_response_pairs`.
    """
    if config.responses is not None:
        build_response_pairs(config)
        return
    if is_shards(config.images):
        _build_shards(config)
        return
    table = build_pairs(config)
    for bad in table.bad_rows:
        tqdm.write(f"skipped {bad}")
    if len(table.pairs):
        tqdm.write(
            f"{len(table.pairs)} pairs in {Path(config.output) / METADATA}; {table.ties} prompts "
            f"without two candidates that differ enough"
        )
    else:
        tqdm.write(f"process {config.shard} of {config.num_shards} is done; others are not yet")


def _build_shards(config: PairsBuildConfig) -> None:
    configs = _configs(config, None)
    check_rules(config, configs)
    refuse_whole(config, configs)
    device = resolve_device(config.device)
    loaded = {key: (load_reward(c, device), c) for key, c in configs.items()}
    rewards = ShardRewards(loaded, device, config.cache)
    records, share = pair_shards(config, configs, rewards)
    if records is None:
        share.report(rewards.said())
        return
    names = ("pairs", "rows", "skipped", "prompts_without")
    pairs, rows, skipped, without = (sum(record[name] for record in records) for name in names)
    if not pairs:
        raise InputError(f"no pairs: no prompt of {rows} images has two whose scores differ enough")
    tqdm.write(
        f"{pairs} pairs of {rows} images in {config.output}, {skipped} images skipped"
        f"{rewards.said()}; {without} prompts without two candidates that differ enough"
    )


def build_pairs(
    config: PairsBuildConfig,
    *,
    adapter: ImageAdapter | None = None,
    reward: Reward | None = None,
) -> PairTable:
    """Sample or list candidates, score them, and pair them.

    Args:
        config: prompts, model or folder of images, rewards, and the rule of pairing.
        adapter: a loaded model, instead of `config.model`.
        reward: scores images one by one, instead of `config.rewards`.

    Returns:
        The pairs, in which `ties` counts prompts without a pair; no pairs as long as other
        processes have not finished their share.

    Raises:
        InputError: if options or prompts are unusable, an image or its score is (named in the
            message), no pair results, or the output cannot be written.
    """
    if config.num_shards == 1 and world_size() == 1:
        shard, num_shards = launched()
        config = replace(config, shard=shard, num_shards=num_shards)
    _check(config)
    configs = _configs(config, reward)
    check_rules(config, configs)
    device = resolve_device(config.device)
    bad_rows: list[BadRow] = []
    if config.images is None:
        groups = plan_candidates(config)
    else:
        groups, bad_rows = list_candidates(config)
    share = groups[config.shard :: config.num_shards]
    if config.images is None:
        sample_missing(share, config, lambda: _adapter(config, adapter, device))
    scorer = _scorer(configs, config, reward, device)
    log = ScoreLog(as_path(config.output), config.num_shards, config.shard)
    score_groups(share, scorer, log, config.on_bad_row)
    log.read()
    if not _is_complete(groups, log, scorer):
        return PairTable([], bad_rows)
    selected = _write_pairs(groups, log, scorer, config)
    table = read_pairs(PairsConfig(path=str(as_path(config.output) / METADATA)))
    return PairTable(table.pairs, bad_rows + bad_images(groups, log), selected.prompts_without)


def _check(config: PairsBuildConfig) -> None:
    if not config.prompts:
        raise InputError("prompts is missing: give a file with one prompt per line")
    if not 0 <= config.shard < config.num_shards:
        raise InputError(f"shard {config.shard} is not in 0 ... {config.num_shards - 1}")
    if config.images is None and config.candidates_per_prompt < 2:
        raise InputError("candidates_per_prompt must be at least 2 to make a pair")


def _adapter(config: PairsBuildConfig, given: ImageAdapter | None, device: str) -> ImageAdapter:
    if given is not None:
        return given
    return load_adapter(config, device=device, for_training=False)


def _configs(config: PairsBuildConfig, reward: Reward | None) -> dict[str, RewardConfig]:
    if reward is not None:
        return {reward.name: RewardConfig(name=reward.name)}
    configs = {reward_key(c): c for c in config.rewards}
    if all(c.eval_only for c in config.rewards):
        raise InputError("rewards is empty: at least one reward must rank the candidates")
    if len(configs) < len(config.rewards):
        raise InputError("rewards has the same reward with the same options twice")
    return configs


def _scorer(
    configs: Mapping[str, RewardConfig],
    config: PairsBuildConfig,
    reward: Reward | None,
    device: str,
) -> Scorer:
    """Load the rewards, also where all is scored: only then can be told that none has changed."""
    if reward is not None:
        return Scorer.of(configs, {reward.name: reward}, device)
    loaded = {key: load_reward(c, device) for key, c in configs.items()}
    return Scorer.of(configs, loaded, device, config.cache)


def _is_complete(groups: Sequence[Group], log: ScoreLog, scorer: Scorer) -> bool:
    entries = [log.known.get(candidate.name) for group in groups for candidate in group]
    return all(entry is not None and scorer.knows(entry) for entry in entries)


def _write_pairs(
    groups: Sequence[Group], log: ScoreLog, scorer: Scorer, config: PairsBuildConfig
) -> Selected:
    output = as_path(config.output)
    usable = [[c for c in group if log.known[c.name].problem is None] for group in groups]
    candidates = [candidate for group in usable for candidate in group]
    if not candidates:
        raise InputError("none of the candidates can be read")
    totals = _totals(candidates, log, scorer, config.combine)
    selected = _select(usable, totals, log, scorer, config)
    if not selected.rows:
        raise InputError(
            f"no pairs: no prompt has two candidates whose scores differ by more than min_gap "
            f"{config.min_gap:g}"
        )
    write_jsonl(
        output / "scores.jsonl",
        [
            {"file_name": c.name, "prompt": c.prompt, "score": totals[c.name]}
            | scorer.scores(log.known[c.name])
            for c in candidates
        ],
    )
    write_jsonl(output / METADATA, selected.rows)
    return selected


def _totals(
    candidates: Sequence[Candidate], log: ScoreLog, scorer: Scorer, combine: Combination
) -> dict[str, float]:
    raw = {
        key: torch.tensor(scores, dtype=torch.float64)
        for key, scores in _raw(candidates, log, scorer).items()
    }
    prompts = [candidate.prompt for candidate in candidates]
    combined = combine_scores(raw, scorer.configs, prompts, combine).total
    return dict(zip((c.name for c in candidates), combined.tolist(), strict=True))


def _select(
    groups: Sequence[Group],
    totals: Mapping[str, float],
    log: ScoreLog,
    scorer: Scorer,
    config: PairsBuildConfig,
) -> Selected:
    rows: list[dict[str, Any]] = []
    without = 0
    for group in groups:
        # The same picture twice would make the same pair twice.
        distinct = list({log.known[c.name].image_hash: c for c in reversed(group)}.values())[::-1]
        scores = [totals[candidate.name] for candidate in distinct]
        pairs = select_pairs(
            scores,
            rule=config.rule,
            min_gap=config.min_gap,
            top_k=config.top_k,
            each=scores_of_each(scorer.configs, _raw(distinct, log, scorer)),
        )
        without += not pairs
        for best, worst in pairs:
            rows.append(
                {
                    "prompt": distinct[best].prompt,
                    CHOSEN_FILE: _place(distinct[best], log, config),
                    REJECTED_FILE: _place(distinct[worst], log, config),
                    "score_chosen": scores[best],
                    "score_rejected": scores[worst],
                    "margin": scores[best] - scores[worst],
                }
            )
    return Selected(rows, without)


def _raw(candidates: Sequence[Candidate], log: ScoreLog, scorer: Scorer) -> dict[str, list[float]]:
    """List the scores of candidates by reward."""
    known = [scorer.scores(log.known[candidate.name]) for candidate in candidates]
    return {key: [scores[key] for scores in known] for key in scorer.configs}


def _place(candidate: Candidate, log: ScoreLog, config: PairsBuildConfig) -> str:
    """Return the image's path inside the output folder, where it is copied if it lies outside."""
    output = as_path(config.output)
    real = candidate.path.resolve()
    if real.is_relative_to(output.resolve()):
        return real.relative_to(output.resolve()).as_posix()
    suffix = image_suffix(candidate.ref, MAX_PIXELS)
    name = f"images/{log.known[candidate.name].image_hash}{suffix}"
    if not (output / name).exists():
        write_bytes(output / name, read_image_bytes(candidate.ref))
    return name
