"""Curriculum over pairs, easy to hard (Croitoru et al. 2024, arXiv 2405.13637).

A pair with a large gap between its sides is easy. Pairs are put into B buckets by their gap; stage
k trains on buckets 1 to k, so that every stage keeps what the ones before it had. Two
difficulties:

- `rank_gap`, the paper: among M ranked images of a prompt, bucket k holds the rank gaps in
  ((M - 1)(B - k) / B, (M - 1)(B - k + 1) / B].
- `score_gap`, the authors' code: B + 1 evenly spaced thresholds from the largest gap down to the
  smallest; stage k uses the gaps of at least threshold k + 1, the last stage all of them.

Pairs carry no list of candidates, so the images of a prompt are told apart by their scores: M is
the number of distinct scores in the prompt's pairs, and equal scores share a rank. `scope: global`
ranks, or spaces thresholds, over all prompts together. Gaps are absolute: labels decide who wins,
scores how hard it is.

Deviations from the authors' code: stages count optimizer steps only (theirs also advance at the
end of an epoch and once per accumulated batch), and the order of pairs is rebuilt at each stage.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from mmalign.config import CurriculumConfig
from mmalign.data.order import BatchPlan, StepSampler, batch_indices
from mmalign.randomness import derive_seed
from mmalign.types import InputError

logger = logging.getLogger(__name__)

Scores = tuple[float | None, float | None]
"""Scores of the chosen and the rejected side of a pair."""


def rank_gap_buckets(num_candidates: int, num_buckets: int) -> list[tuple[float, float]]:
    """List the rank gaps (low, high] of each bucket, easiest first, for M ranked candidates."""
    width = (num_candidates - 1) / num_buckets
    return [(width * (k - 1), width * k) for k in range(num_buckets, 0, -1)]


def score_gap_thresholds(gaps: Iterable[float], num_buckets: int) -> list[float]:
    """List the B + 1 thresholds from the largest gap to the smallest."""
    values = list(gaps)
    return [float(t) for t in np.linspace(min(values), max(values), num_buckets + 1)[::-1]]


def assign_buckets(
    prompts: Sequence[str], scores: Sequence[Scores], config: CurriculumConfig
) -> list[int | None]:
    """Assign each pair its bucket, 0 the easiest, or None for a score gap under the threshold.

    A gap equal to `keep_threshold` is dropped too, so a tie in scores always is.

    Args:
        prompts: prompt of each pair.
        scores: scores of both sides of each pair.
        config: difficulty, scope, number of buckets and `keep_threshold`.

    Raises:
        InputError: If a pair lacks a finite score, `num_buckets` is not positive, or
            `keep_threshold` is negative.
    """
    if config.num_buckets < 1:
        raise InputError(f"curriculum.num_buckets must be at least 1, got {config.num_buckets}")
    if config.keep_threshold < 0:
        raise InputError("curriculum.keep_threshold must not be negative")
    known = [_known(number, prompts[number], pair) for number, pair in enumerate(scores)]
    groups: dict[str, list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        groups[prompt if config.scope == "prompt" else ""].append(number)
    rule = _rank_buckets if config.difficulty == "rank_gap" else _score_buckets
    buckets: list[int | None] = [None] * len(known)
    for members in groups.values():
        found = rule([known[m] for m in members], config.num_buckets, config.keep_threshold)
        for member, bucket in zip(members, found, strict=True):
            buckets[member] = bucket
    return buckets


def curriculum_stages(
    prompts: Sequence[str], scores: Sequence[Scores], config: CurriculumConfig
) -> list[list[int]]:
    """List the indices of the pairs of each stage; every stage contains the one before it.

    A bucket without pairs adds no stage: it is merged into the next one, with a warning.

    Raises:
        InputError: If a pair lacks a finite score, no pair is left, or all fall into one of several
            buckets, so that there would be no curriculum.
    """
    buckets = assign_buckets(prompts, scores, config)
    used = sorted({bucket for bucket in buckets if bucket is not None})
    if not used:
        raise InputError(
            f"curriculum: no pair has a score gap over keep_threshold {config.keep_threshold:g};"
            " lower it"
        )
    if len(used) == 1 < config.num_buckets:
        raise InputError(
            f"curriculum: all pairs fall into bucket {used[0] + 1} of {config.num_buckets} by"
            f" {config.difficulty} per {config.scope}; use difficulty score_gap, scope global, more"
            " candidates per prompt, or no curriculum"
        )
    _report(buckets, used, config)
    return [[i for i, b in enumerate(buckets) if b is not None and b <= last] for last in used]


class CurriculumSampler(StepSampler):
    """A `StepSampler` whose pairs depend on the stage, and the stage on the optimizer step alone.

    Stage s lasts `stage_steps` optimizer steps, the last one until `max_steps`. Each stage has its
    own permutations keyed by (seed, stage, epoch) and starts at their beginning.
    """

    def __init__(self, stages: Sequence[Sequence[int]], stage_steps: int, plan: BatchPlan) -> None:
        """Sample from the pairs of each stage.

        Raises:
            InputError: If `stage_steps` is not positive or a stage is empty.
        """
        if stage_steps < 1:
            raise InputError(f"curriculum.stage_steps must be at least 1, got {stage_steps}")
        if not stages or not all(stages):
            raise InputError("curriculum: every stage needs at least one pair")
        super().__init__(len(stages[-1]), plan)
        self.stages = stages
        self.stage_steps = stage_steps

    def stage(self, step: int) -> int:
        """Return the stage of an optimizer step, counted from 0."""
        return min(step // self.stage_steps, len(self.stages) - 1)

    def batch(self, step: int, position: int) -> list[int]:
        """List the pairs of the batch at `position` within optimizer step `step`."""
        stage = self.stage(step)
        pool = self.stages[stage]
        since_start = step - stage * self.stage_steps
        number = since_start * self.plan.batches_per_step + position
        seed = derive_seed(self.plan.seed, stage, "curriculum")
        inside = batch_indices(number, size=len(pool), batch_size=self.plan.batch_size, seed=seed)
        return [pool[index] for index in inside]


def _known(number: int, prompt: str, pair: Scores) -> tuple[float, float]:
    chosen, rejected = pair
    if chosen is None or rejected is None or not np.isfinite([chosen, rejected]).all():
        raise InputError(
            f"curriculum: pair {number} ({prompt[:60]!r}) has no finite score_chosen and"
            " score_rejected; score the pairs or train without a curriculum"
        )
    return chosen, rejected


def _rank_buckets(
    pairs: Sequence[tuple[float, float]], num_buckets: int, keep_threshold: float
) -> list[int | None]:
    ranks = {score: rank for rank, score in enumerate(sorted({s for pair in pairs for s in pair}))}
    largest = len(ranks) - 1
    found: list[int | None] = []
    for chosen, rejected in pairs:
        if abs(chosen - rejected) <= keep_threshold:
            found.append(None)
            continue
        gap = abs(ranks[chosen] - ranks[rejected])
        # The bucket's upper end is the smallest multiple of largest / B not below the gap; in
        # integers, because gaps often lie on an end.
        found.append(num_buckets + (-gap * num_buckets // largest))
    return found


def _score_buckets(
    pairs: Sequence[tuple[float, float]], num_buckets: int, keep_threshold: float
) -> list[int | None]:
    gaps = [abs(chosen - rejected) for chosen, rejected in pairs]
    kept = [gap for gap in gaps if gap > keep_threshold]
    if not kept:
        return [None] * len(gaps)
    # The last stage takes every gap, so its threshold is not compared with: rounding loses nothing.
    inner = score_gap_thresholds(kept, num_buckets)[1:-1]
    return [sum(gap < t for t in inner) if gap > keep_threshold else None for gap in gaps]


def _report(buckets: Sequence[int | None], used: Sequence[int], config: CurriculumConfig) -> None:
    dropped = sum(bucket is None for bucket in buckets)
    if dropped:
        logger.info("curriculum: %d pairs with too small a score gap are left out", dropped)
    if len(used) < config.num_buckets:
        logger.warning(
            "curriculum: only %d of %d buckets have pairs, so there are as many stages",
            len(used),
            config.num_buckets,
        )
