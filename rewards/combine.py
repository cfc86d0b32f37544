"""Several rewards as one: normalize each, weight, sum, and with GDPO normalize the sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mmalign.config import Combination, RewardConfig
from mmalign.processes import gather, rank, world_size
from mmalign.scoring import BatchedReward, is_out_of_memory, score_samples, scores_sets
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


Watch = Callable[[Mapping[str, Tensor]], None]
"""Told the raw scores (B,) of every reward, those that are `eval_only` included."""
_OF_EACH: Mapping[Combination, Normalization] = {
    "zscore": "prompt_zscore",
    "rank": "prompt_rank",
    "gdpo": "prompt_zscore",
}


class CombinedReward:
    """Several rewards as one, over those that are not `eval_only`.

    `combine` says how:

    - `sum`: r = sum_k weight_k * normalize_k(r_k), each reward by its own `normalize`;
    - `zscore`: the same with every reward as its z-score among the samples of its prompt;
    - `rank`: the mean, by weight, of the ranks among the samples of its prompt, 0 to 1;
    - `gdpo`: `zscore`, then the z-score of the sum over all samples of the call: the advantage of
      GDPO (Liu et al. 2026, arXiv 2601.05242), each reward normalized within its group, weighted
      and summed, then normalized over the batch.

    Deviations are the population's, with nothing added; where all scores are equal the result is 0.
    The code that GDPO's authors publish takes those of a sample (n - 1) and adds 1e-4 to each. In
    groups of one size its result is, but for the 1e-4, the one here times sqrt((B - 1) / B).

    Whatever compares samples does so within one call, so score everything that is to be compared in
    one call, or score in parts and use `combine_scores` on the whole.

    Attributes:
        scores_sets: whether a reward, watched ones included, compares the samples of a prompt.
        watch: told the raw scores of each call; only then rewards that are `eval_only` run at all.
    """

    name = "combined"
    modality: Modality = "image"

    def __init__(
        self,
        rewards: Sequence[tuple[Reward, RewardConfig]],
        combine: Combination = "sum",
        *,
        pooled: bool = False,
    ) -> None:
        """Combine rewards with their configurations.

        Args:
            rewards: rewards and their configurations.
            combine: how scores become one number.
            pooled: normalize over the samples of all processes, which then call it together.

        Raises:
            InputError: if every reward is `eval_only`, or a normalization is unknown or is given
                where `combine` decides it.
        """
        self.configs = dict(zip(unique_names(rewards), (c for _, c in rewards), strict=True))
        self.rewards = dict(zip(self.configs, (r for r, _ in rewards), strict=True))
        self.combine = combine
        self.watch: Watch | None = None
        training = [(r, c) for r, c in rewards if not c.eval_only]
        if not training:
            raise InputError("no reward to train on: every reward is eval_only")
        how = [normalization_of(config, combine) for _, config in training]
        self.compares = any(one != "none" for one in how) or combine == "gdpo"
        self.scores_sets = any(scores_sets(reward) for reward, _ in rewards)
        self.differentiable = "prompt_rank" not in how and all(
            reward.differentiable for reward, _ in training
        )
        self.range = _range(training, combine)
        self._batched = {name: BatchedReward(reward) for name, reward in self.rewards.items()}
        self._pooled = pooled and self.compares

    def __call__(
        self, samples: Tensor, prompts: Sequence[str], names: Sequence[str] | None = None
    ) -> Tensor:
        """Score samples; returns the combination (B,). Rewards that are `eval_only` do not count.

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
            return combine_scores(raw, self.configs, prompts, self.combine)
        everyone = gather(({name: scores.cpu() for name, scores in raw.items()}, list(prompts)))
        pool = {name: torch.cat([scores[name] for scores, _ in everyone]) for name in raw}
        texts = [prompt for _, part in everyone for prompt in part]
        total, _, normalized = combine_scores(pool, self.configs, texts, self.combine)
        first = sum(len(part) for _, part in everyone[: rank()])
        own = slice(first, first + len(prompts))
        return RewardDetails(
            total[own], dict(raw), {name: scores[own] for name, scores in normalized.items()}
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
        raw = {name: self._score(name, samples, prompts, names) for name in self.rewards}
        return combine_scores(raw, self.configs, prompts, self.combine)

    def _trained_on(
        self, samples: Tensor, prompts: Sequence[str], names: Sequence[str] | None
    ) -> dict[str, Tensor]:
        aside = {name for name, config in self.configs.items() if config.eval_only}
        raw = {
            name: self._score(name, samples, prompts, names)
            for name in self.rewards
            if name not in aside
        }
        if self.watch is not None:
            with torch.no_grad():
                seen = {n: self._score(n, samples.detach(), prompts, names) for n in sorted(aside)}
            self.watch({**{name: scores.detach() for name, scores in raw.items()}, **seen})
        return raw

    def _score(
        self, name: str, samples: Tensor, prompts: Sequence[str], names: Sequence[str] | None
    ) -> Tensor:
        """Score at once where gradients are wanted, which need all memory at the end anyway."""
        if samples.requires_grad and torch.is_grad_enabled():
            try:
                return score_samples(self.rewards[name], samples, prompts, names)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                first = names[0] if names else "sample 0"
                more = f" and {len(prompts) - 1} more" if len(prompts) > 1 else ""
                raise InputError(
                    f"reward {name} runs out of memory on {first}{more}, gradients included: "
                    "lower decode_batch_size, or use smaller images or a lower precision"
                ) from error
        return self._batched[name](samples, prompts, names)

    def _check_gradients(self, raw: Mapping[str, Tensor]) -> None:
        for name, scores in raw.items():
            if self.rewards[name].differentiable and not scores.requires_grad:
                raise InputError(
                    f"reward {name} says that it is differentiable, but its scores have no gradient"
                )


def combine_scores(
    raw: Mapping[str, Tensor],
    configs: Mapping[str, RewardConfig],
    prompts: Sequence[str],
    combine: Combination = "sum",
) -> RewardDetails:
    """Combine scores that are known already.

    Args:
        raw: scores (B,) per reward.
        configs: weight and normalization per reward, same names.
        prompts: one per sample.
        combine: how, as in `CombinedReward`.

    Raises:
        InputError: if no reward is left to sum.
    """
    normalized = {
        name: normalize_scores(scores, prompts, normalization_of(configs[name], combine))
        for name, scores in raw.items()
        if not configs[name].eval_only
    }
    if not normalized:
        raise InputError("no reward to train on: every reward is eval_only")
    parts = [configs[name].weight * scores for name, scores in normalized.items()]
    total = torch.stack(parts).sum(0)
    if combine == "rank":
        total = total / _total_weight([configs[name] for name in normalized])
    elif combine == "gdpo":
        total = normalize_scores(total, prompts, "zscore")
    return RewardDetails(total, dict(raw), normalized)


def normalization_of(config: RewardConfig, combine: Combination) -> Normalization:
    """Say how a reward is normalized under a combination.

    Raises:
        InputError: the reward asks for a normalization and the combination brings its own.
    """
    if combine == "sum":
        return config.normalize
    if combine not in _OF_EACH:
        raise InputError(f"unknown combination {combine!r}: use sum, zscore, rank or gdpo")
    if config.normalize != "none":
        raise InputError(
            f"reward {config.name}: normalize {config.normalize} is for combine sum; "
            f"combine {combine} normalizes every reward itself"
        )
    return _OF_EACH[combine]


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


def _total_weight(configs: Sequence[RewardConfig]) -> float:
    total = sum(abs(config.weight) for config in configs)
    if not total:
        raise InputError("rewards: every weight is 0")
    return total


def _range(
    training: Sequence[tuple[Reward, RewardConfig]], combine: Combination
) -> tuple[float, float]:
    low, high = 0.0, 0.0
    for reward, config in training:
        how = normalization_of(config, combine)
        if how == "none":
            ends = [config.weight * end if config.weight else 0.0 for end in reward.range]
        elif how == "prompt_rank":
            ends = [0.0, config.weight]
        else:
            ends = [float("-inf"), float("inf")]
        low, high = low + min(ends), high + max(ends)
    if combine == "rank":
        scale = _total_weight([config for _, config in training])
        return low / scale, high / scale
    return low, high
