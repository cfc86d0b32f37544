"""What all ways of building pairs share: pictures in a folder, pictures in shards, and answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from mmalign.data.selection import select_pairs
from mmalign.rewards.combine import combine_scores

if TYPE_CHECKING:
    from mmalign.config import PairsBuildConfig, RewardConfig


def check_rules(config: PairsBuildConfig, rewards: Mapping[str, RewardConfig]) -> None:
    """Combine and pair two made-up candidates, so that what would fail does before any is scored.

    Raises:
        InputError: for options of the combination, of the rewards' normalization, or of the rule
            that do not go together or are out of range.
    """
    scores = {key: torch.tensor([0.0, 1.0]) for key in rewards}
    totals = combine_scores(scores, rewards, ["", ""], config.combine).total.tolist()
    each = scores_of_each(rewards, {key: [0.0, 1.0] for key in rewards})
    rule, min_gap, top_k = config.rule, config.min_gap, config.top_k
    select_pairs(totals, rule=rule, min_gap=min_gap, top_k=top_k, each=each)


def scores_of_each(
    rewards: Mapping[str, RewardConfig], scores: Mapping[str, Sequence[float]]
) -> list[list[float]]:
    """List the scores by each reward that takes part, turned so that higher is better.

    Args:
        rewards: configurations by key.
        scores: of the candidates of a prompt, by key.
    """
    return [
        [math.copysign(1, reward.weight) * score for score in scores[key]]
        for key, reward in rewards.items()
        if not reward.eval_only and reward.weight
    ]
