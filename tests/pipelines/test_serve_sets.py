"""A reward that compares the images of a call, behind a server: strangers' images stay apart."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from served_reward import served
from torch import Tensor

from mmalign.config import RewardConfig
from mmalign.rewards import load_reward
from mmalign.rewards._identity import reward_identity
from mmalign.rewards.lpips import LpipsReward

IMAGES = torch.randint(0, 256, (6, 3, 64, 64), generator=torch.Generator().manual_seed(0)) / 255


class Gated(LpipsReward):
    """LPIPS that waits until a test lets it go on, and keeps how many images it was given."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.sizes: list[int] = []
        self.open = threading.Event()

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        self.sizes.append(len(samples))
        self.open.wait(20)
        return super().__call__(samples, prompts)


def test_requests_that_wait_are_not_compared_with_each_other(
    lpips_options: Mapping[str, str],
) -> None:
    reward = Gated(**lpips_options)
    with served(reward) as url, ThreadPoolExecutor(3) as pool:
        remote = load_reward(RewardConfig(name="http", options={"url": url, "retries": 0}))
        parts = [IMAGES[start : start + 2] for start in (0, 2, 4)]
        found = [pool.submit(remote, part, ["the same prompt"] * 2) for part in parts]
        while json.loads(urllib.request.urlopen(url + "health").read())["waiting"] < 3:
            time.sleep(0.01)
        reward.open.set()
        scores = [future.result() for future in found]
    assert reward.sizes == [2, 2, 2]
    for part, own in zip(parts, scores, strict=True):
        assert own.tolist() == pytest.approx(reward(part, [""] * 2).tolist(), rel=1e-6)


def test_requests_hold_whole_prompts(lpips_options: Mapping[str, str]) -> None:
    reward = Gated(**lpips_options)
    reward.open.set()
    prompts = ["a", "b"] * 3
    with served(reward) as url:
        options = {"url": url, "retries": 0, "batch_size": 2, "revision": "1", "scores_sets": True}
        config = RewardConfig(name="http", options=options)
        remote = load_reward(config)
        found = remote(IMAGES, prompts)
    assert sorted(reward.sizes) == [3, 3]
    assert found.tolist() == pytest.approx(reward(IMAGES, prompts).tolist(), rel=1e-6)
    assert reward_identity(config, remote) is None  # whatever its revision is
