from __future__ import annotations

import math

import pytest
import torch

from mmalign.intervals import mean_ci, win_rate
from mmalign.types import InputError


def test_win_rate_counts() -> None:
    rate = win_rate([1, 2, 3, 0, 5], [0, 1, 3, 1, 5], list("abcde"))
    assert (rate.n, rate.wins, rate.losses, rate.ties) == (5, 2, 1, 2)
    assert rate.value == pytest.approx(2 / 3)
    assert rate.value_with_ties == pytest.approx(3 / 5)


def test_swapping_sides_mirrors_the_rate() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 40, generator=generator)
    groups = [str(i // 4) for i in range(40)]
    one, other = win_rate(a, b, groups), win_rate(b, a, groups)
    assert one.value == pytest.approx(1 - other.value)
    assert one.ci95 == pytest.approx((1 - other.ci95[1], 1 - other.ci95[0]))


def test_interval_matches_the_binomial_one() -> None:
    wins = torch.tensor([1.0] * 70 + [-1.0] * 30)
    rate = win_rate(wins, torch.zeros(100), [str(i) for i in range(100)], resamples=4000)
    half = 1.96 * math.sqrt(0.7 * 0.3 / 100)
    assert rate.ci95 == pytest.approx((0.7 - half, 0.7 + half), abs=0.015)


def test_interval_is_clustered_by_prompt() -> None:
    """Ten copies of ten outcomes say no more than ten outcomes."""
    outcomes = torch.tensor([1.0] * 7 + [-1.0] * 3)
    single = win_rate(outcomes, torch.zeros(10), [str(i) for i in range(10)])
    copies = win_rate(
        outcomes.repeat_interleave(10), torch.zeros(100), [str(i // 10) for i in range(100)]
    )
    assert copies.ci95 == single.ci95
    assert single.ci95[1] - single.ci95[0] > 0.4


def test_interval_depends_on_the_seed_alone() -> None:
    values = torch.rand(30, generator=torch.Generator().manual_seed(1))
    groups = [str(i) for i in range(30)]
    torch.manual_seed(1)
    first = mean_ci(values, groups, seed=3)
    torch.manual_seed(2)
    assert mean_ci(values, groups, seed=3) == first
    assert mean_ci(values, groups, seed=4).ci95 != first.ci95


def test_nothing_decided() -> None:
    rate = win_rate([1.0, 2.0], [1.0, 2.0], ["a", "b"])
    assert math.isnan(rate.value)
    assert all(map(math.isnan, rate.ci95))
    assert (rate.ties, rate.value_with_ties) == (2, 0.5)


def test_mean_ci() -> None:
    mean = mean_ci([1.0, 2.0, 3.0, 6.0], ["a", "a", "b", "c"])
    assert mean.value == 3.0
    assert mean.ci95[0] < 3.0 < mean.ci95[1]
    assert mean_ci([2.0, 2.0], ["a", "b"]).ci95 == (2.0, 2.0)


@pytest.mark.parametrize(
    ("candidate", "baseline", "groups", "message"),
    [
        ([], [], [], "0 values"),
        ([1.0], [1.0, 2.0], ["a", "b"], "1 values for 2 prompts"),
        ([1.0, math.nan], [1.0, 2.0], ["a", "b"], "value nan for prompt 'b'"),
    ],
)
def test_bad_scores(
    candidate: list[float], baseline: list[float], groups: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        win_rate(candidate, baseline, groups)
