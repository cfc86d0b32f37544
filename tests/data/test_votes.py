from __future__ import annotations

from collections import Counter

import pytest

from mmalign.data.votes import LabelPair, Tally, agreement, round_robin

PAIR = LabelPair("key", "a prompt", "aa", "bb")


def tally(first: int, second: int, ties: int) -> Tally:
    return Tally(PAIR, first, second, ties)


@pytest.mark.parametrize(
    ("votes", "decision"),
    [
        ((1, 0, 0), ("aa", "bb")),
        ((1, 3, 2), ("bb", "aa")),
        ((2, 2, 0), None),
        ((0, 0, 1), None),
        ((1, 0, 1), None),
        ((1, 0, 2), None),
    ],
)
def test_majority(votes: tuple[int, int, int], decision: tuple[str, str] | None) -> None:
    assert tally(*votes).decision == decision


def test_shares_count_ties_as_half_a_vote() -> None:
    assert (tally(2, 0, 1).share("aa"), tally(2, 0, 1).share("bb")) == (2.5 / 3, 0.5 / 3)


def test_agreement_by_hand() -> None:
    found = agreement(
        [tally(2, 0, 0), tally(1, 1, 0), tally(0, 0, 2), tally(0, 3, 0), tally(1, 0, 0)]
    )
    # Equal couples: 1, 0, 1, 1. Ties: 2 of 9 votes; chance (2/9)^2 + (7/9)^2 / 2.
    chance = 4 / 81 + 49 / 162
    assert (found.pairs, found.share) == (4, 0.75)
    assert found.kappa == pytest.approx((0.75 - chance) / (1 - chance))


def test_agreement_at_its_ends() -> None:
    assert agreement([tally(1, 0, 0)]) == (0, None, None)
    assert agreement([tally(2, 0, 0), tally(0, 2, 0)]) == (2, 1, 1)
    assert agreement([tally(0, 0, 2)]) == (1, 1, None)
    assert agreement([tally(1, 1, 0)]).kappa == -1
    # Forty people who toss a coin: next to nothing.
    assert agreement([tally(20, 20, 0)]).kappa == pytest.approx(-1 / 39)


@pytest.mark.parametrize("count", range(8))
def test_round_robin_has_every_couple_once_and_uses_all_evenly(count: int) -> None:
    pairs = round_robin(count)
    assert sorted(pairs) == [(i, j) for i in range(count) for j in range(i + 1, count)]
    for end in range(len(pairs) + 1):
        uses = Counter(item for pair in pairs[:end] for item in pair)
        assert max(uses.values(), default=0) - min(uses[item] for item in range(count) or [0]) <= 2
    half = count // 2
    assert len({item for pair in pairs[:half] for item in pair}) == 2 * half
