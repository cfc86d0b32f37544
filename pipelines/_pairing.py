"""What all ways of building pairs share: pictures in a folder, pictures in shards, and answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmalign.config import RewardConfig


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
