"""Exact truth about captions and answers: how much of what was said is there, how much was not.

CHAIR (Rohrbach et al. 2018, arXiv 1809.02156) with objects named by color and shape, and truth from
the scene instead of annotations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmalign.shapes.scene import Scene
from mmalign.shapes.speech import ObjectName, mark_mentions, mentions
from mmalign.types import InputError

RESAMPLES = 2000
Counts = NDArray[np.int64]
Ratios = dict[str, tuple[Counts, Counts]]
"""Parts and wholes by measure, (N,) each: a measure is the sum of parts over the sum of wholes."""


class Interval(NamedTuple):
    """A measure with its 95 % interval."""

    value: float
    ci95: tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionCheck:
    """One caption against its scene.

    `mentioned` has every mention in order, `hallucinated` those of objects that are not there;
    `covered` and `present` count different objects; `words` is the caption's length.
    """

    mentioned: tuple[ObjectName, ...]
    hallucinated: tuple[ObjectName, ...]
    covered: int
    present: int
    words: int


def object_names(scene: Scene) -> set[ObjectName]:
    """Name the objects of a scene."""
    return {(item.color, item.shape) for item in scene.objects}


def check_caption(scene: Scene, caption: str) -> CaptionCheck:
    """Compare what a caption mentions with what is there."""
    there, said = object_names(scene), mentions(caption)
    return CaptionCheck(
        mentioned=tuple(said),
        hallucinated=tuple(name for name in said if name not in there),
        covered=len(there & set(said)),
        present=len(there),
        words=len(caption.split()),
    )


def mark_caption(scene: Scene, caption: str) -> list[tuple[str, bool | None]]:
    """Cut a caption into pieces: object names with whether they are there, other text with None."""
    there = object_names(scene)
    return [
        (text, None if name is None else name in there) for text, name in mark_mentions(caption)
    ]


def caption_metrics(
    scenes: Sequence[Scene], captions: Sequence[str], *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Interval]:
    """Measure captions of scenes.

    `chair_s` is the share of captions with a hallucinated object, `chair_i` that of mentions,
    repetitions counted; `coverage` the share of the scenes' different objects that were mentioned;
    `length` the mean number of words. Intervals are percentile bootstraps over captions.

    Args:
        scenes: what is there.
        captions: what was said, one per scene.
        seed: of the bootstrap.
        resamples: number of bootstrap resamples.

    Raises:
        InputError: there is nothing to measure, or the counts differ.
    """
    return _intervals(_caption_ratios(scenes, captions), seed, resamples)


def caption_changes(
    scenes: Sequence[Scene],
    before: Sequence[str],
    after: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Interval]:
    """Measure what changed, after - before, by captions of the same scenes.

    Args:
        scenes: what is there.
        before: what was said, one per scene.
        after: what is said now, one per scene.
        seed: of the bootstrap, which draws scenes.
        resamples: number of bootstrap resamples.

    Raises:
        InputError: there is nothing to measure, or the counts differ.
    """
    sides = _caption_ratios(scenes, before), _caption_ratios(scenes, after)
    return _intervals(sides[1], seed, resamples, minus=sides[0])


def read_yes_no(answer: str) -> bool | None:
    """Read an answer by its first word: True for yes, False for no, None for anything else."""
    words = answer.replace(",", " ").replace(".", " ").lower().split()
    return {"yes": True, "no": False}.get(words[0]) if words else None


def question_metrics(
    truths: Sequence[bool],
    answers: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Interval]:
    """Measure answers to yes/no questions.

    `yes_no_accuracy` is the share of right answers, where anything but yes or no is wrong, and
    `yes_rate` the share of `yes`. Intervals are percentile bootstraps over questions.

    Args:
        truths: whether yes is right.
        answers: what was said.
        seed: of the bootstrap.
        resamples: number of bootstrap resamples.

    Raises:
        InputError: there is nothing to measure, or the counts differ.
    """
    return _intervals(_answer_ratios(truths, answers), seed, resamples)


def question_changes(
    truths: Sequence[bool],
    before: Sequence[str],
    after: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Interval]:
    """Measure what changed, after - before, by answers to the same questions.

    Args:
        truths: whether yes is right.
        before: what was said.
        after: what is said now.
        seed: of the bootstrap, which draws questions.
        resamples: number of bootstrap resamples.

    Raises:
        InputError: there is nothing to measure, or the counts differ.
    """
    sides = _answer_ratios(truths, before), _answer_ratios(truths, after)
    return _intervals(sides[1], seed, resamples, minus=sides[0])


def caption_scores(scenes: Sequence[Scene], captions: Sequence[str]) -> list[float]:
    """Score each caption in [0, 1]: F1 of the different objects it mentions against those there.

    F1 = 2 covered / (mentioned + present), so that neither inventing nor leaving out pays.

    Raises:
        InputError: there is nothing to score, or the counts differ.
    """
    _check(scenes, captions, "captions")
    checks = [check_caption(scene, text) for scene, text in zip(scenes, captions, strict=True)]
    return [2 * c.covered / (len(set(c.mentioned)) + c.present) for c in checks]


def _caption_ratios(scenes: Sequence[Scene], captions: Sequence[str]) -> Ratios:
    _check(scenes, captions, "captions")
    checks = [check_caption(scene, text) for scene, text in zip(scenes, captions, strict=True)]
    invented = _column(len(c.hallucinated) for c in checks)
    return {
        "chair_s": (_column(bool(c.hallucinated) for c in checks), _ones(checks)),
        "chair_i": (invented, _column(len(c.mentioned) for c in checks)),
        "coverage": (_column(c.covered for c in checks), _column(c.present for c in checks)),
        "length": (_column(c.words for c in checks), _ones(checks)),
    }


def _answer_ratios(truths: Sequence[bool], answers: Sequence[str]) -> Ratios:
    _check(truths, answers, "answers")
    said = [read_yes_no(answer) for answer in answers]
    right = _column(given == true for given, true in zip(said, truths, strict=True))
    return {
        "yes_no_accuracy": (right, _ones(said)),
        "yes_rate": (_column(given is True for given in said), _ones(said)),
    }


def _check(truths: Sequence[object], said: Sequence[str], what: str) -> None:
    if not truths or len(truths) != len(said):
        raise InputError(
            f"{len(said)} {what} for {len(truths)}: give one per scene or question, at least one"
        )


def _column(values: Iterable[int]) -> Counts:
    return np.array(list(values), dtype=np.int64)


def _ones(rows: Sequence[object]) -> Counts:
    return np.ones(len(rows), dtype=np.int64)


def _intervals(
    ratios: Ratios, seed: int, resamples: int, minus: Ratios | None = None
) -> dict[str, Interval]:
    """Divide sums, and sums over rows drawn with replacement; the same rows of `minus`."""
    count = len(next(iter(ratios.values()))[0])
    draws = np.random.default_rng(seed).integers(count, size=(resamples, count))
    measured = {}
    for name, ratio in ratios.items():
        value, resampled = _share(ratio, draws)
        if minus is not None:
            base = _share(minus[name], draws)
            value, resampled = value - base[0], resampled - base[1]
        low, high = np.quantile(resampled, (0.025, 0.975))
        measured[name] = Interval(value, (float(low), float(high)))
    return measured


def _share(ratio: tuple[Counts, Counts], draws: Counts) -> tuple[float, NDArray[np.float64]]:
    """Divide part by whole, 0 where nothing was counted: of all rows, and of each draw."""
    part, whole = ratio
    resampled = part[draws].sum(1) / np.maximum(whole[draws].sum(1), 1)
    return float(part.sum() / max(whole.sum(), 1)), resampled
