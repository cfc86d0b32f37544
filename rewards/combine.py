"""Several rewards as one: normalize each, weight, sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mmalign.config import RewardConfig
from mmalign.processes import gather, rank, world_size
from mmalign.scoring import score_samples
from mmalign.types import InputError, Modality, Reward

Normalization = Literal["none", "zscore", "prompt_zscore", "prompt_rank"]


class RewardDetails(NamedTuple):
    """The weighted sum and what it is made of; every tensor has shape (B,).

    `raw` holds every reward's own scores, those that are `eval_only` included; `normalized` only
    those in the sum, before their weight.
    """

    total: Tensor
    raw: dict[str, Tensor]
    normalized: dict[str, Tensor]


class CombinedReward:
    """Weighted sum of rewards.

        r = sum_k weight_k * normalize_k(r_k)

    over the rewards that are not `eval_only`. Normalizations other than `none` are taken over the
    samples of one call, so score everything that is to be compared in one call, or score in parts
    and use `combine_scores` on the whole.
    """

    name = "combined"
    modality: Modality = "image"

    def __init__(
        self, rewards: Sequence[tuple[Reward, RewardConfig]], *, pooled: bool = False
    ) -> None:
        """Combine rewards with their configurations.

        Args:
            rewards: rewards and their configurations.
            pooled: normalize over the samples of all processes, which then call it together.

        Raises:
            InputError: if every reward is `eval_only`, or a normalization is unknown.
        """
        self.configs = dict(zip(unique_names(rewards), (c for _, c in rewards), strict=True))
        self.rewards = dict(zip(self.configs, (r for r, _ in rewards), strict=True))
        training = [(r, c) for r, c in rewards if not c.eval_only]
        if not training:
            raise InputError("no reward to train on: every reward is eval_only")
        self.differentiable = all(
            reward.differentiable and config.normalize != "prompt_rank"
            for reward, config in training
        )
        self.range = _range(training)
        self._pooled = pooled and any(c.normalize != "none" for _, c in training)

    def __call__(
        self, samples: Tensor, prompts: Sequence[str], names: Sequence[str] | None = None
    ) -> Tensor:
        """Score samples; returns the weighted sum (B,). Rewards that are `eval_only` do not run.

        Args:
            samples: images (B, 3, H, W) in [0, 1].
            prompts: one per sample.
            names: one per sample, for messages.

        Raises:
            InputError: naming reward and sample, for a score that is not a finite number; naming
                the reward, if it promises a gradient and its scores carry none.
        """
        raw = self._trained_on(samples, prompts, names)
        if samples.requires_grad and torch.is_grad_enabled():
            self._check_gradients(raw)
        return self._combined(raw, prompts).total

    def each(
        self, samples: Tensor, prompts: Sequence[str], names: Sequence[str] | None = None
    ) -> Tensor:
        """Score samples; returns every reward of the sum, normalized and weighted, (R, B).

        Raises:
            InputError: as `details`.
        """
        raw = self._trained_on(samples, prompts, names)
        normalized = self._combined(raw, prompts).normalized
        return torch.stack(
            [self.configs[name].weight * scores for name, scores in normalized.items()]
        )

    def _combined(self, raw: Mapping[str, Tensor], prompts: Sequence[str]) -> RewardDetails:
        if not self._pooled or world_size() == 1:
            return combine_scores(raw, self.configs, prompts)
        everyone = gather(({name: scores.cpu() for name, scores in raw.items()}, list(prompts)))
        pool = {name: torch.cat([scores[name] for scores, _ in everyone]) for name in raw}
        texts = [prompt for _, part in everyone for prompt in part]
        total, _, normalized = combine_scores(pool, self.configs, texts)
        first = sum(len(part) for _, part in everyone[: rank()])
        own = slice(first, first + len(prompts))
        return RewardDetails(
            total[own], dict(raw), {name: scores[own] for name, scores in normalized.items()}
        )

    def _trained_on(
        self, samples: Tensor, prompts: Sequence[str], names: Sequence[str] | None
    ) -> dict[str, Tensor]:
        return {
            name: score_samples(reward, samples, prompts, names)
            for name, reward in self.rewards.items()
            if not self.configs[name].eval_only
        }

    def _check_gradients(self, raw: Mapping[str, Tensor]) -> None:
        for name, scores in raw.items():
            if self.rewards[name].differentiable and not scores.requires_grad:
                raise InputError(
                    f"reward {name} says that it is differentiable, but its scores have no gradient"
                )

    def details(
        self, samples: Tensor, prompts: Sequence[str], names: Sequence[str] | None = None
    ) -> RewardDetails:
        """Score samples with every reward, `eval_only` ones included.

        Args:
            samples: images (B, 3, H, W) in [0, 1].
            prompts: one per sample; samples with the same prompt form a group.
            names: one per sample, for messages.

        Raises:
            InputError: naming reward and sample, for a score that is not a finite number.
        """
        raw = {
            name: score_samples(reward, samples, prompts, names)
            for name, reward in self.rewards.items()
        }
        return combine_scores(raw, self.configs, prompts)


def combine_scores(
    raw: Mapping[str, Tensor], configs: Mapping[str, RewardConfig], prompts: Sequence[str]
) -> RewardDetails:
    """Normalize, weight and sum scores that are known already.

    Args:
        raw: scores (B,) per reward.
        configs: weight and normalization per reward, same names.
        prompts: one per sample.

    Raises:
        InputError: if no reward is left to sum.
    """
    normalized = {
        name: normalize_scores(scores, prompts, configs[name].normalize)
        for name, scores in raw.items()
        if not configs[name].eval_only
    }
    if not normalized:
        raise InputError("no reward to train on: every reward is eval_only")
    parts = [configs[name].weight * scores for name, scores in normalized.items()]
    return RewardDetails(torch.stack(parts).sum(0), dict(raw), normalized)


def normalize_scores(scores: Tensor, groups: Sequence[str], how: Normalization) -> Tensor:
    """Normalize scores (B,) over the whole set, or within groups of the same prompt.

    `zscore` subtracts the mean and divides by the population's standard deviation; where all
    scores are equal the result is 0. `prompt_rank` gives 0 to the worst and 1 to the best of a
    prompt, ties the mean of their ranks, and 0.5 to a prompt's only sample.

    Args:
        scores: (B,).
        groups: prompt of each score.
        how: the normalization.

    Returns:
        Normalized scores (B,), same dtype.

    Raises:
        InputError: for an unknown normalization.
    """
    if how == "none":
        return scores
    if how == "zscore":
        return _zscore(scores)
    function = {"prompt_zscore": _zscore, "prompt_rank": _rank}.get(how)
    if function is None:
        raise InputError(
            f"unknown normalization {how!r}: use none, zscore, prompt_zscore or prompt_rank"
        )
    result = torch.zeros_like(scores)
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    for indices in members.values():
        rows = torch.tensor(indices, device=scores.device)
        result = result.index_copy(0, rows, function(scores[rows]))
    return result


def unique_names(rewards: Sequence[tuple[Reward, RewardConfig]]) -> list[str]:
    """Name each reward for tables and columns; repeated names get `_2`, `_3`, ..."""
    names: list[str] = []
    for reward, _ in rewards:
        name, count = reward.name, 1
        while name in names:
            count += 1
            name = f"{reward.name}_{count}"
        names.append(name)
    return names


def _zscore(scores: Tensor) -> Tensor:
    if bool((scores == scores[0]).all()):
        return torch.zeros_like(scores)
    centered = scores - scores.mean()
    return centered / scores.std(correction=0)


def _rank(scores: Tensor) -> Tensor:
    if len(scores) == 1:
        return torch.full_like(scores, 0.5)
    below = (scores[:, None] > scores[None, :]).sum(1)
    equal = (scores[:, None] == scores[None, :]).sum(1) - 1
    return ((below + equal / 2) / (len(scores) - 1)).to(scores.dtype)


def _range(training: Sequence[tuple[Reward, RewardConfig]]) -> tuple[float, float]:
    low, high = 0.0, 0.0
    for reward, config in training:
        if config.normalize == "none":
            ends = [config.weight * end if config.weight else 0.0 for end in reward.range]
        elif config.normalize == "prompt_rank":
            ends = [0.0, config.weight]
        else:
            ends = [float("-inf"), float("inf")]
        low, high = low + min(ends), high + max(ends)
    return low, high
