"""Intervals: clusters stay together, and the shortcut draws from the same distribution."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest

from mmalign.hallucination.bootstrap import intervals, ratio, totals
from mmalign.hallucination.outcome import Case


def case(cluster: str, **counts: float) -> Case:
    return Case(
        item=cluster,
        question="",
        answer="",
        truth="",
        verdict="",
        badness=0,
        counts=counts,
        cluster=cluster,
    )


def rate(total: Mapping[str, float]) -> dict[str, float]:
    return {"rate": ratio(total["bad"], total["all"]), "never": math.nan}


def test_totals() -> None:
    assert totals([case("a", x=1, y=2), case("b", x=3)]) == {"x": 4, "y": 2}


def test_interval_is_that_of_drawing_answers_one_by_one() -> None:
    generator = np.random.default_rng(0)
    bad = generator.random(300) < 0.2
    cases = [case(str(i), bad=bool(b), all=1) for i, b in enumerate(bad)]
    found = intervals(cases, rate, seed=1, resamples=4000)
    drawn = [generator.choice(bad, len(bad)).mean() for _ in range(4000)]
    assert found["rate"] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.004)
    assert "never" not in found


def test_answers_of_a_cluster_are_drawn_together() -> None:
    alone = [case(str(i), bad=i % 2, all=1) for i in range(200)]
    tied = [case(str(i % 20), bad=i % 2, all=1) for i in range(200)]
    narrow, wide = (intervals(cases, rate, seed=0)["rate"] for cases in (alone, tied))
    # Twenty clusters of ten equal answers are twenty observations.
    assert (wide[1] - wide[0]) / (narrow[1] - narrow[0]) == pytest.approx(math.sqrt(10), rel=0.25)


def test_seed_decides() -> None:
    cases = [case(str(i), bad=i % 3 == 0, all=1 + i % 2) for i in range(50)]
    assert intervals(cases, rate, seed=3) == intervals(cases, rate, seed=3)
    assert intervals(cases, rate, seed=3) != intervals(cases, rate, seed=4)


def test_resamples_without_a_value_are_left_out() -> None:
    low, high = intervals([case("a", bad=1, all=1), case("b", bad=0, all=0)], rate, seed=0)["rate"]
    assert (low, high) == (1, 1)
