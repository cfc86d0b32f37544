"""Checks of rewritten answers that need no model, and the order of a curriculum."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from mmalign.randomness import derive_seed

RewriteFault = Literal["echo", "empty", "short", "long"]
SHORTEST, LONGEST = 1 / 4, 3.0
MIN_CHARACTERS = 3
LABELS = ("Question", "Answer", "Corrections", "New answer")
"""How the parts of the prompt for rewriting begin; see `prompts.rewrite`."""
_ECHO = re.compile(
    rf"^\s*(?:{'|'.join(LABELS)})\s*:|\((?:tips|question|original text|corrected text)\)",
    re.IGNORECASE | re.MULTILINE,
)


def rewrite_fault(original: str, rewritten: str) -> RewriteFault | None:
    """Say what is wrong with a rewritten answer, by the rules of the authors' post-filter.

    - `echo`: it repeats a label of the prompt that the original does not have;
    - `empty`: it has fewer than 3 characters;
    - `short`, `long`: fewer than 1/4 or more than 3 times the characters of the original.
    """
    if _ECHO.search(rewritten) and not _ECHO.search(original):
        return "echo"
    if len(rewritten.strip()) < MIN_CHARACTERS:
        return "empty"
    if len(rewritten) < SHORTEST * len(original):
        return "short"
    if len(rewritten) > LONGEST * len(original):
        return "long"
    return None


def hardness(question_ids: Sequence[str], *, warmup_share: float, seed: int) -> dict[str, float]:
    """Place questions on a curriculum: 0 during the warm-up, then rising evenly to 1.

    The paper's TPR-CL spends 60 % of its pairs on greedy (worst) candidates and the rest on
    rejected answers whose wrong candidates score higher and higher; its schedule was never
    published, and this one is ours: the order is a seeded shuffle, and the i-th of n pairs after
    the warm-up takes the wrong candidate at the share i / n of those of its topic, ordered by S.

    Args:
        question_ids: every question, whatever its order.
        warmup_share: share of the questions that come first, with hardness 0.
        seed: of the shuffle.

    Returns:
        Hardness by id, in the order in which the pairs are to be trained on.
    """
    order = sorted(question_ids, key=lambda name: (derive_seed(seed, "curriculum", name), name))
    warm = int(warmup_share * len(order) + 1e-9)
    rest = len(order) - warm
    return {name: max(0, i + 1 - warm) / max(rest, 1) for i, name in enumerate(order)}
