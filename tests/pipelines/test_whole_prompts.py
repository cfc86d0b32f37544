"""Rewards that score a sample against the others of its prompt are given whole prompts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from mmalign.config import RewardConfig
from mmalign.pipelines._cached import CachedReward
from mmalign.rewards import load_reward

IMAGES = torch.randint(0, 256, (10, 3, 64, 64), generator=torch.Generator().manual_seed(0)) / 255


def test_scores_of_a_smaller_set_are_not_kept(
    lpips_options: Mapping[str, str], tmp_path: Path
) -> None:
    config = RewardConfig(name="lpips", options=dict(lpips_options))
    reward = load_reward(config)
    cached = CachedReward(reward, config, str(tmp_path / "cache"))
    names = [f"{index}.png" for index in range(5)]
    cached(IMAGES[:3], ["p"] * 3, names[:3])
    found = cached(IMAGES[:5], ["p"] * 5, names)
    assert found == pytest.approx(reward(IMAGES[:5], ["p"] * 5).tolist(), rel=1e-6)
