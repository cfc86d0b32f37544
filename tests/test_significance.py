"""The exact test against scipy's, and Holm's correction against a published example."""

from __future__ import annotations

import itertools

import pytest
from scipy.stats import binomtest

from mmalign.significance import holm, sign_flip_p


@pytest.mark.parametrize(("wins", "losses", "ties"), [(9, 1, 4), (5, 5, 0), (30, 12, 3), (1, 0, 0)])
def test_single_images_give_the_sign_test(wins: int, losses: int, ties: int) -> None:
    expected = binomtest(wins, wins + losses).pvalue
    assert sign_flip_p([1] * wins + [-1] * losses + [0] * ties) == pytest.approx(expected, 1e-12)


def test_whole_prompts_are_flipped() -> None:
    differences = [4, 3, -1, 2, 0, 1]
    flips = itertools.product((1, -1), repeat=len(differences))
    sums = [abs(sum(s * d for s, d in zip(f, differences, strict=True))) for f in flips]
    expected = sum(value >= sum(differences) for value in sums) / len(sums)
    assert sign_flip_p(differences) == pytest.approx(expected, 1e-12)
    assert sign_flip_p([-value for value in differences]) == pytest.approx(expected, 1e-12)


def test_nothing_decided_is_no_difference() -> None:
    assert sign_flip_p([]) == sign_flip_p([0, 0]) == 1.0


def test_many_prompts_stay_exact() -> None:
    expected = binomtest(560, 1000).pvalue
    assert sign_flip_p([1] * 560 + [-1] * 440) == pytest.approx(expected, 1e-9)


def test_holm() -> None:
    # Smallest times 4, next times 3, ...; never below an earlier one, never above 1.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []
