"""Scoring in batches, with scores of earlier runs from a cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mmalign.config import as_path
from mmalign.data.score_cache import ScoreCache, image_key, response_key
from mmalign.rewards import load_rewards
from mmalign.rewards._identity import describe_reward, reward_identity
from mmalign.rewards.combine import unique_names
from mmalign.scoring import BatchedReward
from mmalign.types import InputError

if TYPE_CHECKING:
    from mmalign.config import RewardConfig
    from mmalign.types import Modality, Response, Reward, TextReward

SAVED_EVERY = 256


class CachedReward:
    """Scores samples without gradients, as many at a time as memory allows; each only once.

    Attributes:
        cache: where scores are kept; None without a folder, or where they may not be kept.
        name: of the reward.
        scores_sets: whether the reward is to be given whole prompts.
    """

    def __init__(
        self,
        reward: Reward | TextReward,
        config: RewardConfig,
        folder: str | None = None,
        saved_every: int = SAVED_EVERY,
    ) -> None:
        """Open the cache.

        Args:
            reward: the reward that `config` names, loaded.
            config: its name, options and batch size.
            folder: folder of the cache; None keeps nothing.
            saved_every: new scores between two savings of the cache: what a crash may cost.

        Raises:
            InputError: if the folder cannot be written, or a file of the reward cannot be read.
        """
        self._batched = BatchedReward(reward, config.batch_size)
        self.name, self.scores_sets = reward.name, self._batched.scores_sets
        self._unsaved, self._saved_every = 0, saved_every
        self.cache = None if folder is None else _open(reward, config, as_path(folder))

    def __call__(
        self,
        samples: Tensor | Sequence[Response],
        prompts: Sequence[str],
        names: Sequence[str],
    ) -> list[float]:
        """Score images (B, 3, H, W) in [0, 1], or answers, of prompts.

        Raises:
            InputError: as `BatchedReward`, or if the cache cannot be written.
        """
        if self.cache is None:
            with torch.no_grad():
                return [float(s) for s in self._batched(samples, prompts, names).tolist()]
        keys = [_key(sample, prompt) for sample, prompt in zip(samples, prompts, strict=True)]
        found = self.cache.get(keys)
        missing = [index for index, score in enumerate(found) if score is None]
        if missing:
            chosen = _take(samples, missing)
            asked, called = [prompts[i] for i in missing], [names[i] for i in missing]
            with torch.no_grad():
                scores = self._batched(chosen, asked, called).tolist()
            self.cache.put({keys[i]: s for i, s in zip(missing, scores, strict=True)})
            self._unsaved += len(missing)
            if self._unsaved >= self._saved_every:
                self.save()
            for index, score in zip(missing, scores, strict=True):
                found[index] = score
        return cast("list[float]", found)

    def save(self) -> None:
        """Write the new scores.

        Raises:
            InputError: if the cache cannot be written.
        """
        if self.cache is not None:
            self.cache.save()
            self._unsaved = 0


def cached_rewards(
    configs: Sequence[RewardConfig],
    folder: str | None,
    device: str = "cpu",
    modality: Modality = "image",
) -> dict[str, CachedReward]:
    """Load rewards, each with its cache, by a name of its own.

    Raises:
        InputError: as `load_reward` and `CachedReward`.
    """
    loaded = load_rewards(configs, device, modality)
    names = unique_names(loaded)
    return {
        name: CachedReward(reward, config, folder)
        for name, (reward, config) in zip(names, loaded, strict=True)
    }


@contextmanager
def saved(rewards: Mapping[str, CachedReward]) -> Iterator[None]:
    """Write the caches at the end of the block, also of one that fails."""
    try:
        yield
    finally:
        for reward in rewards.values():
            reward.save()


def hits(rewards: Mapping[str, CachedReward]) -> str:
    """Say how many scores came from caches, led by a comma; nothing where there are none."""
    caches = [reward.cache for reward in rewards.values() if reward.cache is not None]
    if not caches:
        return ""
    return f", {sum(c.hits for c in caches)} scores from the cache"


def identify(reward: Reward | TextReward, config: RewardConfig) -> dict[str, Any]:
    """Describe a reward: with another description its scores may be others.

    Raises:
        InputError: if a file of the reward cannot be read.
    """
    with _files_of(config):
        return describe_reward(config, reward)


def identify_kept(reward: Reward | TextReward, config: RewardConfig) -> dict[str, Any] | None:
    """Describe a reward for a cache; None, and a line that says so, where nothing may be kept.

    Raises:
        InputError: if a file of the reward cannot be read.
    """
    with _files_of(config):
        identity = reward_identity(config, reward)
    if identity is None:
        tqdm.write(
            f"reward {reward.name}: its scores are not cached, since the same sample may get "
            "another score next time"
        )
    return identity


@contextmanager
def _files_of(config: RewardConfig) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"reward {config.name}: cannot read its files: {error}") from error


def _open(reward: Reward | TextReward, config: RewardConfig, folder: Path) -> ScoreCache | None:
    identity = identify_kept(reward, config)
    return None if identity is None else ScoreCache(folder, config.name, identity)


def _key(sample: Tensor | Response, prompt: str) -> bytes:
    if isinstance(sample, Tensor):
        return image_key(sample, prompt)
    return response_key(sample, prompt)


def _take(samples: Tensor | Sequence[Response], rows: list[int]) -> Tensor | list[Response]:
    if isinstance(samples, Tensor):
        return samples[rows]
    return [samples[row] for row in rows]
