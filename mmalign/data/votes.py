"""What several people's judgements of the same pairs amount to: majority and agreement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class LabelPair(NamedTuple):
    """Two images of a prompt to choose from.

    `first` and `second` are the hexadecimal hashes of the encoded images, in an order that means
    nothing; `key` identifies prompt and images together.
    """

    key: str
    prompt: str
    first: str
    second: str


class Tally(NamedTuple):
    """How many people chose the first image of a pair, the second, or neither."""

    pair: LabelPair
    first: int
    second: int
    ties: int

    @property
    def votes(self) -> int:
        """Count the judgements."""
        return self.first + self.second + self.ties

    @property
    def decision(self) -> tuple[str, str] | None:
        """The chosen and the rejected image; None unless one has more votes than all else."""
        pair = self.pair
        if self.first > max(self.second, self.ties):
            return pair.first, pair.second
        if self.second > max(self.first, self.ties):
            return pair.second, pair.first
        return None

    def share(self, image: str) -> float:
        """Return the share of votes for an image, in [0, 1]; a tie is half a vote for both."""
        votes = self.first if image == self.pair.first else self.second
        return (votes + self.ties / 2) / self.votes


class Agreement(NamedTuple):
    """Agreement over the pairs that at least two people judged; None where there are none.

    `share` counts pairs on which everybody said the same. `kappa` is Fleiss' kappa, chance
    corrected: 1 is full agreement, 0 what chance gives; None too if everything was a tie.
    """

    pairs: int
    share: float | None
    kappa: float | None


def agreement(tallies: Sequence[Tally]) -> Agreement:
    """Measure how far people agree (Fleiss 1971), with any number of judgements per pair.

        kappa = (P - P_e) / (1 - P_e)

    P is the mean over pairs of the share of two people's verdicts that are equal. In
    P_e = t^2 + (1 - t)^2 / 2, with t the share of ties, both images of a pair have the same chance,
    because which of them is called the first means nothing.

    Args:
        tallies: judgements; pairs with fewer than two are left out.
    """
    shared = [tally for tally in tallies if tally.votes >= 2]
    if not shared:
        return Agreement(0, None, None)
    unanimous = sum(tally.votes in tally[1:] for tally in shared)
    observed = sum(map(_equal_verdicts, shared)) / len(shared)
    ties = sum(tally.ties for tally in shared) / sum(tally.votes for tally in shared)
    chance = ties**2 + (1 - ties) ** 2 / 2
    kappa = None if chance == 1 else (observed - chance) / (1 - chance)
    return Agreement(len(shared), unanimous / len(shared), kappa)


def round_robin(count: int) -> list[tuple[int, int]]:
    """List every two of `count` items, so that those at the front use all items evenly.

    The circle method: in each round of `count / 2` pairs every item occurs once.
    """
    seats = list(range(count + count % 2))  # with an odd count, one item a round sits out
    half = len(seats) // 2
    pairs = []
    for _ in range(len(seats) - 1):
        for one, other in zip(seats[:half], reversed(seats[half:]), strict=True):
            if max(one, other) < count:
                pairs.append((min(one, other), max(one, other)))
        seats.insert(1, seats.pop())
    return pairs


def _equal_verdicts(tally: Tally) -> float:
    equal = sum(votes * (votes - 1) for votes in tally[1:])
    return equal / (tally.votes * (tally.votes - 1))
