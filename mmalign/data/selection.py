"""Pairs from the scores of one prompt's candidates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

from mmalign.config import PairRule
from mmalign.types import InputError


def select_pairs(
    scores: Sequence[float],
    *,
    rule: PairRule,
    min_gap: float = 0.0,
    top_k: int = 4,
    each: Sequence[Sequence[float]] = (),
) -> list[tuple[int, int]]:
    """Choose which candidates to pair, by their scores.

    - `best_worst`: the best with the worst;
    - `all_pairs`: every two;
    - `top_k`: every two of the `top_k` best;
    - `pareto`: every two of which one is at least as good by each reward and better by one.

    A pair must have a gap of more than `min_gap`, so candidates that tie are never paired. Equal
    scores are ordered by index.

    Args:
        scores: one per candidate, higher is better.
        rule: which pairs are considered.
        min_gap: gaps up to this are dropped, not negative.
        top_k: ranks considered by `top_k`, at least 2.
        each: for `pareto`, each reward's scores of the candidates, higher is better.

    Returns:
        Indices (chosen, rejected), from the highest rank of the chosen one down.

    Raises:
        InputError: for a score that is not finite, or an option out of range.
    """
    for index, score in enumerate(scores):
        if not math.isfinite(score):
            raise InputError(f"candidate {index} has the score {score}: pairs need finite scores")
    if not min_gap >= 0:
        raise InputError(f"min_gap must not be negative, got {min_gap}")
    if rule == "top_k" and top_k < 2:
        raise InputError(f"top_k must be at least 2, got {top_k}")
    ranking = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    if rule == "best_worst":
        considered = [(ranking[0], ranking[-1])] if ranking else []
    elif rule == "all_pairs":
        considered = list(combinations(ranking, 2))
    elif rule == "top_k":
        considered = list(combinations(ranking[:top_k], 2))
    elif rule == "pareto":
        considered = [pair for pair in combinations(ranking, 2) if _dominates(*pair, each)]
    else:
        raise InputError(f"unknown rule {rule!r}: use best_worst, all_pairs, top_k or pareto")
    return [(best, worst) for best, worst in considered if scores[best] - scores[worst] > min_gap]


def _dominates(best: int, worst: int, each: Sequence[Sequence[float]]) -> bool:
    gaps = [scores[best] - scores[worst] for scores in each]
    return bool(gaps) and min(gaps) >= 0 and max(gaps) > 0
