"""Rewards that are watched while others are trained on: logged in every step, and reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from mmalign.config import EvalConfig, RewardConfig
    from mmalign.types import StepOutput

PREFIX = "reward/"


def with_watched(evaluation: EvalConfig, rewards: Sequence[RewardConfig]) -> EvalConfig:
    """Add the rewards that are `eval_only` to those that an evaluation reports.

    What it reports anyway, as the judge or as a reward, is not added again. Without prompts there
    is no evaluation, and the rewards are only logged.
    """
    known = [*evaluation.rewards, *([evaluation.judge] if evaluation.judge else [])]
    there = [(reward.name, reward.options) for reward in known]
    added = [r for r in rewards if r.eval_only and (r.name, r.options) not in there]
    return replace(evaluation, rewards=[*evaluation.rewards, *added])


class RewardLog:
    """The mean raw score of every reward over the images that a micro-batch had scored.

    It stands in `metrics.jsonl` as `reward/<name>`. What a reward that is not trained on does while
    the others rise shows whether they are being exploited.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, raw: Mapping[str, Tensor]) -> None:
        """Take in the raw scores (B,) of one call."""
        for name, scores in raw.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(scores.double().sum())
            self._counts[name] = self._counts.get(name, 0) + len(scores)

    def take(self) -> dict[str, float]:
        """Return the means since the last call, by metric, and begin anew."""
        means = {f"{PREFIX}{name}": self._sums[name] / n for name, n in self._counts.items()}
        self._sums, self._counts = {}, {}
        return means

    def logged(self, step: Callable[[Any], StepOutput]) -> Callable[[Any], StepOutput]:
        """Add the means to the metrics of a step."""

        def with_rewards(batch: Any) -> StepOutput:
            self.take()
            output = step(batch)
            return output._replace(metrics={**output.metrics, **self.take()})

        return with_rewards
