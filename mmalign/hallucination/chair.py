"""CHAIR: objects of captions that are not in the image (Rohrbach et al. 2018, arXiv 1809.02156).

CHAIR_i = hallucinated mentions / mentions, repetitions counted; CHAIR_s = captions with at least
one / captions; recall = distinct objects mentioned rightly / objects that are there. All are
micro-averaged fractions.

Object HalBench without its language model is the same count with a rate over
the captions that mention any object.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from mmalign.hallucination.bootstrap import Counts, Statistic, intervals, ratio, totals
from mmalign.hallucination.captions import Caption
from mmalign.hallucination.nouns import count_words
from mmalign.hallucination.objects import Objects
from mmalign.hallucination.outcome import Case, Outcome, Span
from mmalign.hallucination.vocabulary import Mention, Vocabulary
from mmalign.types import InputError

HEADLINE = {"chairs": "CHAIRs", "chairi": "CHAIRi", "recall": "recall"}


def evaluate(
    captions: Sequence[Caption],
    objects: Objects,
    vocabulary: Vocabulary,
    *,
    seed: int,
    resamples: int,
) -> Outcome:
    """Score captions.

    Raises:
        InputError: naming the row, for an image whose objects are unknown.
    """
    cases = []
    for caption in captions:
        truth = truth_of(caption, objects)
        cases.append(caption_case(caption, truth, vocabulary.mentions(caption.text)))
    return outcome_of("chair", cases, scores, HEADLINE, seed=seed, resamples=resamples)


def scores(total: Counts) -> dict[str, float]:
    """Compute CHAIR's metrics as fractions; `chairs` and `chair_s` are one, so are the others.

    The official script prints them times 100.
    """
    chair_s = ratio(total["hallucinated"], total["answers"])
    chair_i = ratio(total["absent"], total["mentions"])
    recall = ratio(total["covered"], total["truths"])
    return {
        **{"chairs": chair_s, "chairi": chair_i, "recall": recall},
        **{"chair_s": chair_s, "chair_i": chair_i},
        **beside(total, recall),
    }


def beside(total: Counts, coverage: float) -> dict[str, float]:
    """Compute what is always shown with the scores of free descriptions."""
    length = ratio(total["words"], total["answers"])
    return {
        "length": length,
        "yes_rate": math.nan,
        "no_rate": math.nan,
        "coverage": coverage,
    }


def truth_of(caption: Caption, objects: Objects) -> frozenset[str]:
    """Look up the objects of a caption's image.

    Raises:
        InputError: naming the row, if they are unknown.
    """
    if caption.image not in objects:
        raise InputError(f"{caption.where}: image {caption.image} has no labels")
    return objects[caption.image]


def caption_case(caption: Caption, truth: Collection[str], mentions: Sequence[Mention]) -> Case:
    """Count the mentions of one caption."""
    absent = [mention for mention in mentions if mention.node not in truth]
    covered = {mention.node for mention in mentions} & set(truth)
    invented = dict.fromkeys(_named(mention) for mention in absent)
    return Case(
        item=caption.image,
        question=caption.question,
        answer=caption.text,
        truth=", ".join(sorted(truth)),
        verdict=", ".join(invented) or "nothing invented",
        badness=len(absent),
        counts={
            **{"answers": 1, "words": count_words(caption.text)},
            "parts": len(caption.text.strip().split(" ")),
            **{"mentions": len(mentions), "absent": len(absent)},
            **{"hallucinated": bool(absent), "with_objects": bool(mentions)},
            **{"truths": len(truth), "covered": len(covered)},
        },
        cluster=caption.image,
        spans=spans_of(mentions, truth),
    )


def spans_of(mentions: Iterable[Mention], truth: Collection[str]) -> list[Span]:
    """Mark mentions as present or absent."""
    return [
        Span(mention.start, mention.stop, "good" if mention.node in truth else "bad")
        for mention in mentions
    ]


def outcome_of(
    benchmark: str,
    cases: Sequence[Case],
    statistic: Statistic,
    headline: Mapping[str, str],
    *,
    seed: int,
    resamples: int,
) -> Outcome:
    """Compute metrics and intervals of cases, with a warning where no object was named at all."""
    total = totals(cases)
    silent = f"none of {len(cases):,} answers names an object of the vocabulary: nothing is judged"
    return Outcome(
        benchmark=benchmark,
        metrics=statistic(total),
        ci95=intervals(cases, statistic, seed=seed, resamples=resamples),
        cases=cases,
        headline=headline,
        warnings=[] if total["mentions"] else [silent],
    )


def _named(mention: Mention) -> str:
    return mention.word if mention.word == mention.node else f"{mention.word} ({mention.node})"
