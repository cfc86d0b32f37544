from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmalign.data.selection import select_pairs
from mmalign.types import InputError

SCORES = [0.2, 0.9, 0.5, 0.9]


def test_best_worst() -> None:
    assert select_pairs(SCORES, rule="best_worst") == [(1, 0)]


def test_all_pairs_leaves_out_ties() -> None:
    found = select_pairs(SCORES, rule="all_pairs")
    assert found == [(1, 2), (1, 0), (3, 2), (3, 0), (2, 0)]


def test_top_k() -> None:
    assert select_pairs([4.0, 3.0, 2.0, 1.0], rule="top_k", top_k=3) == [(0, 1), (0, 2), (1, 2)]


def test_min_gap_is_exclusive() -> None:
    assert select_pairs([1.0, 0.5, 0.0], rule="all_pairs", min_gap=0.5) == [(0, 2)]


@pytest.mark.parametrize("scores", [[], [1.0], [2.0, 2.0, 2.0]])
def test_nothing_to_pair(scores: list[float]) -> None:
    assert select_pairs(scores, rule="best_worst") == []


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=8), st.floats(0, 5))
def test_all_pairs_are_exactly_those_over_the_gap(scores: list[float], gap: float) -> None:
    found = select_pairs(scores, rule="all_pairs", min_gap=gap)
    assert len(set(map(frozenset, found))) == len(found)
    assert all(scores[a] - scores[b] > gap for a, b in found)
    expected = sum(abs(scores[a] - scores[b]) > gap for a, b in combinations(range(len(scores)), 2))
    assert len(found) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_refused(value: float) -> None:
    with pytest.raises(InputError, match="candidate 1 has the score"):
        select_pairs([1.0, value], rule="best_worst")


def test_options_out_of_range() -> None:
    with pytest.raises(InputError, match="min_gap"):
        select_pairs(SCORES, rule="all_pairs", min_gap=-1)
    with pytest.raises(InputError, match="min_gap"):
        select_pairs(SCORES, rule="all_pairs", min_gap=float("nan"))
    with pytest.raises(InputError, match="top_k"):
        select_pairs(SCORES, rule="top_k", top_k=1)
    with pytest.raises(InputError, match="unknown rule"):
        select_pairs(SCORES, rule="best")  # type: ignore[arg-type]


def test_pareto_pairs_agree_in_every_reward() -> None:
    """0 beats 1 in both and 2 in one with a tie; 1 and 2 disagree."""
    each = [[3.0, 1.0, 3.0], [5.0, 4.0, 2.0]]
    totals = [sum(column) for column in zip(*each, strict=True)]
    assert select_pairs(totals, rule="pareto", each=each) == [(0, 1), (0, 2)]
    assert select_pairs(totals, rule="pareto", each=each, min_gap=3.0) == []


def test_pareto_leaves_out_what_is_equal_in_all() -> None:
    assert select_pairs([1.0, 1.0], rule="pareto", each=[[1.0, 1.0], [2.0, 2.0]]) == []


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=7))
def test_pareto_pairs_are_exactly_the_dominating_ones(points: list[tuple[int, int]]) -> None:
    each = [[float(value) for value in column] for column in zip(*points, strict=True)]
    totals = [float(sum(point)) for point in points]
    found = set(select_pairs(totals, rule="pareto", each=each))
    expected = {
        (i, j)
        for i, one in enumerate(points)
        for j, two in enumerate(points)
        if one != two and one[0] >= two[0] and one[1] >= two[1]
    }
    assert found == expected
