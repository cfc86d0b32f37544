"""Rewards that go through shards, with the scores that other runs left in a cache.

Scores are kept shard by shard, so that a process holds those of the shard in hand only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mmalign.config import as_path
from mmalign.data.score_cache import ScoreCache
from mmalign.pipelines._cached import CachedReward, identify, identify_kept, saved
from mmalign.pipelines._image_batches import refuse_sets

if TYPE_CHECKING:
    from torch import Tensor

    from mmalign.config import RewardConfig
    from mmalign.types import Reward

SAVED_EVERY = 8192
"""New scores between two savings: few files per shard, however many rows it has."""


class ShardRewards:
    """Scores the images of one shard after the other.

    Attributes:
        identities: what the scores of each reward depend on.
        hits: scores that came from the cache.
    """

    def __init__(
        self,
        rewards: Mapping[str, tuple[Reward, RewardConfig]],
        device: str,
        folder: str | None = None,
    ) -> None:
        """Identify the rewards.

        Args:
            rewards: loaded rewards and their configurations, by name.
            device: where images are scored.
            folder: folder of the cache; None keeps nothing.

        Raises:
            InputError: if a file of a reward cannot be read, or a reward compares the images of a
                prompt.
        """
        self.hits = 0
        self._device = device
        self._folder = None if folder is None else as_path(folder)
        self._rewards = {
            name: CachedReward(reward, config, saved_every=SAVED_EVERY)
            for name, (reward, config) in rewards.items()
        }
        refuse_sets(self._rewards)
        kept = {name: identify_kept(*one) for name, one in rewards.items() if folder is not None}
        self._kept = [name for name, identity in kept.items() if identity is not None]
        self.identities = {name: kept.get(name) or identify(*one) for name, one in rewards.items()}

    def __call__(
        self, images: Tensor, prompts: list[str], names: list[str]
    ) -> dict[str, list[float]]:
        """Score images (B, 3, H, W) in [0, 1] by every reward.

        Raises:
            InputError: as `CachedReward`.
        """
        samples = images.to(self._device)
        return {name: reward(samples, prompts, names) for name, reward in self._rewards.items()}

    def said(self) -> str:
        """Say how many scores came from the cache, led by a comma; nothing without one."""
        return f", {self.hits} scores from the cache" if self._kept else ""

    @contextmanager
    def shard(self, identity: str) -> Iterator[None]:
        """Take the scores of a shard from the cache, and leave new ones there, also on failure.

        Raises:
            InputError: if the cache cannot be written.
        """
        caches = {name: self._open(name, identity) for name in self._kept}
        for name, cache in caches.items():
            self._rewards[name].cache = cache
        try:
            with saved(self._rewards):
                yield
        finally:
            for name, cache in caches.items():
                self._rewards[name].cache = None
                self.hits += cache.hits

    def _open(self, name: str, identity: str) -> ScoreCache:
        assert self._folder is not None
        known: dict[str, Any] = {**self.identities[name], "shard": identity}
        return ScoreCache(self._folder, known["name"], known)
