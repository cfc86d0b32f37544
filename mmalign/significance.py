"""Whether differences are more than chance: an exact paired test, and Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def sign_flip_p(differences: Sequence[int]) -> float:
    """Test that differences are symmetric about zero (Fisher's randomization test, two-sided).

        p = P(|sum_i s_i d_i| >= |sum_i d_i|),  s_i = +1 or -1 with probability 1/2 each

    The distribution of the sum is convolved exactly, so nothing is drawn. With differences of -1, 0
    and 1 this is the sign test. For comparisons of several images per prompt give one difference
    per prompt, wins minus losses: whole prompts are flipped, because their images go together.

    Args:
        differences: one whole number per independent unit.

    Returns:
        The p-value in (0, 1]; 1 if no difference is known.
    """
    steps = [abs(value) for value in differences if value]
    total = sum(steps)
    chances = np.zeros(2 * total + 1)  # of every sum from -total to total
    chances[total] = 1.0
    for step in steps:
        chances = (np.roll(chances, step) + np.roll(chances, -step)) / 2
    reached = abs(sum(differences))
    sums = np.abs(np.arange(-total, total + 1))
    return float(min(1.0, chances[sums >= reached].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values so that the chance of any false finding among them is bounded (Holm 1979).

        p~_(k) = max_{j <= k} min(1, (m - j + 1) p_(j)),  p_(1) <= ... <= p_(m)

    Returns:
        The adjusted values in the order given; below alpha means a difference at level alpha.
    """
    adjusted = [1.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
