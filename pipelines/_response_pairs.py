"""Pairs of answers from their scores: what `pairs build --responses` does.

The output folder has `pairs.jsonl`, which `train vlm-dpo` reads, `images/` with copies of the
images by their content, and `scores.jsonl` with every answer and its scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm.auto import tqdm

from mmalign.config import PairsConfig, as_path
from mmalign.data.files import write_bytes, write_jsonl
from mmalign.data.images import hash_image, image_suffix, read_image_bytes
from mmalign.data.schema import RowError, content_hash
from mmalign.data.selection import select_pairs
from mmalign.pipelines._cached import CachedReward, hits, saved
from mmalign.pipelines._evaluation import resolve_device
from mmalign.pipelines._pairing import check_rules, scores_of_each
from mmalign.pipelines._responses import SCORES, Answered, read_responses, score_responses
from mmalign.pipelines._scores import reward_key
from mmalign.rewards import load_reward
from mmalign.rewards.combine import combine_scores
from mmalign.types import ImageRef, InputError

if TYPE_CHECKING:
    from mmalign.config import PairsBuildConfig, RewardConfig

PAIRS = "pairs.jsonl"
SOURCE = "scores"
ANY_SIZE = 2**62


class Pool(NamedTuple):
    """Answers with their scores by reward, (N,) each, and what the rewards make of them."""

    rows: Sequence[Answered]
    raw: Mapping[str, torch.Tensor]
    totals: list[float]


def build_response_pairs(config: PairsBuildConfig) -> list[dict[str, Any]]:
    """Score answers, pair those to the same question about the same images, and write the pairs.

    A row that has a number under `scores` for a reward's name, as `mmalign score` writes it, is not
    scored again.

    Returns:
        The rows of `pairs.jsonl`.

    Raises:
        InputError: if rows or rewards are unusable, or no pair results.
    """
    rewards = _rewards(config)
    check_rules(config, rewards)
    limit = PairsConfig().max_pixels
    answers = read_responses(
        str(config.responses), config.images, on_bad_row=config.on_bad_row, max_pixels=limit
    )
    pool = _scored(config, rewards, answers.rows)
    output = as_path(config.output)
    rows, without = _pairs(config, rewards, pool, output)
    if not rows:
        raise InputError(
            f"no pairs: no question has two answers whose scores differ by more than min_gap "
            f"{config.min_gap:g}"
        )
    write_jsonl(output / "scores.jsonl", _table(pool))
    write_jsonl(output / PAIRS, rows)
    tqdm.write(
        f"{len(rows)} pairs in {output / PAIRS}; {without} questions without two answers that "
        f"differ enough; {len(answers.bad_rows)} bad rows skipped"
    )
    return rows


def _rewards(config: PairsBuildConfig) -> dict[str, RewardConfig]:
    named = [reward.name for reward in config.rewards]
    keys = named if len(set(named)) == len(named) else [reward_key(r) for r in config.rewards]
    rewards = dict(zip(keys, config.rewards, strict=True))
    if len(rewards) < len(config.rewards):
        raise InputError("rewards has the same reward with the same options twice")
    if all(reward.eval_only for reward in config.rewards):
        raise InputError("rewards is empty: at least one reward must rank the answers")
    return rewards


def _scored(
    config: PairsBuildConfig, rewards: Mapping[str, RewardConfig], rows: Sequence[Answered]
) -> Pool:
    raw: dict[str, torch.Tensor] = {}
    device = resolve_device(config.device)
    for key, reward in rewards.items():
        scores: list[float | None] = [_known(row, key) for row in rows]
        left = [index for index, score in enumerate(scores) if score is None]
        if left:
            loaded = CachedReward(load_reward(reward, device, "text"), reward, config.cache)
            asked = {key: loaded}
            with saved(asked):
                found = score_responses([rows[index] for index in left], asked)[key]
            for index, score in zip(left, found, strict=True):
                scores[index] = score
            tqdm.write(f"{key}: {len(left)} answers scored{hits(asked)}")
        raw[key] = torch.tensor(scores, dtype=torch.float64)
    groups = [_group(row).hex() for row in rows]
    totals = combine_scores(raw, rewards, groups, config.combine).total.tolist()
    return Pool(rows, raw, totals)


def _known(row: Answered, key: str) -> float | None:
    """Take a score that the file has already."""
    scores = row.row.get(SCORES)
    value = scores.get(key) if isinstance(scores, Mapping) else None
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{row.where}: the score {key} is {str(value)[:40]!r}, not a number")
    return float(value)


def _pairs(
    config: PairsBuildConfig, rewards: Mapping[str, RewardConfig], pool: Pool, output: Path
) -> tuple[list[dict[str, Any]], int]:
    groups: dict[bytes, dict[str, int]] = {}
    for index, row in enumerate(pool.rows):
        # The same answer twice would make the same pair twice.
        groups.setdefault(_group(row), {}).setdefault(row.response.text.strip(), index)
    rows: list[dict[str, Any]] = []
    without = 0
    for members in list(groups.values())[: config.num_prompts]:
        places = [place for text, place in members.items() if text]
        raw = {key: [float(scores[place]) for place in places] for key, scores in pool.raw.items()}
        pairs = select_pairs(
            [pool.totals[place] for place in places],
            rule=config.rule,
            min_gap=config.min_gap,
            top_k=config.top_k,
            each=scores_of_each(rewards, raw),
        )
        without += not pairs
        rows += [_row(pool, places[best], places[worst], output) for best, worst in pairs]
    return rows, without


def _row(pool: Pool, best: int, worst: int, output: Path) -> dict[str, Any]:
    chosen, rejected = pool.rows[best], pool.rows[worst]
    high, low = pool.totals[best], pool.totals[worst]
    texts = {
        "prompt": chosen.prompt,
        "chosen": chosen.response.text.strip(),
        "rejected": rejected.response.text.strip(),
    }
    identity = "\0".join([_group(chosen).hex(), texts["chosen"], texts["rejected"]])
    return {
        "images": [_place(image, output) for image in chosen.response.images],
        **texts,
        "score_chosen": high,
        "score_rejected": low,
        "margin": high - low,
        "source": SOURCE,
        "pair_id": content_hash(identity.encode()).hex(),
    }


def _group(row: Answered) -> bytes:
    """Identify question and images: answers to both can be compared."""
    parts = [row.prompt.strip().encode()]
    try:
        parts += [hash_image(image) for image in row.response.images if isinstance(image, ImageRef)]
    except RowError as error:
        raise InputError(f"{row.where}: {error}") from error
    return content_hash(b"".join(len(part).to_bytes(8, "big") + part for part in parts))


def _place(image: Any, output: Path) -> str:
    """Copy an image into the output folder; returns its name there."""
    data = read_image_bytes(image)
    suffix = image_suffix(ImageRef(data, image.where), ANY_SIZE)
    name = f"images/{content_hash(data).hex()}{suffix}"
    if not (output / name).exists():
        write_bytes(output / name, data)
    return name


def _table(pool: Pool) -> list[dict[str, Any]]:
    return [
        {
            "where": row.where,
            "prompt": row.prompt,
            "response": row.response.text,
            "score": pool.totals[index],
            SCORES: {key: float(scores[index]) for key, scores in pool.raw.items()},
        }
        for index, row in enumerate(pool.rows)
    ]
