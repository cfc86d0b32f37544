"""AMBER: objects in free descriptions, and yes/no questions (Wang et al. 2023, arXiv 2311.07397).

Generative answers have the ids of annotations with `truth` and `hallu` objects, discriminative
ones those with `truth` yes or no; the positive class of the latter is "no". Everything is micro-
averaged, in percent, and rounded to one decimal as `inference.py` does, which also starts every
denominator at 0.001.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmalign.data.files import read_lines
from mmalign.hallucination.answers import Strict, amber_official, read_yes_no
from mmalign.hallucination.bootstrap import Counts
from mmalign.hallucination.nouns import Word, count_words, lemma, words
from mmalign.hallucination.outcome import Case, Span
from mmalign.hallucination.records import Record, id_field, read_json, read_records, text_field
from mmalign.types import InputError

CATEGORY_OF_TYPE = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",
}
GROUPS = {
    "": ("existence", "state", "number", "action", "relation"),
    "existence_": ("existence",),
    "attribute_": ("state", "number", "action"),
    "state_": ("state",),
    "number_": ("number",),
    "action_": ("action",),
    "relation_": ("relation",),
}
"""Prefix of metrics -> categories that they are over."""
DIMENSIONS = {
    "g": ("generative",),
    "d": ("existence", "state", "number", "action", "relation"),
    "de": ("existence",),
    "da": ("state", "number", "action"),
    "dr": ("relation",),
    "a": ("generative", "existence", "state", "number", "action", "relation"),
}
START = 0.001
"""What the official script begins its denominators with."""
Similar = Callable[[str, str], bool]
"""Whether two nouns mean the same, for matching beyond equal words."""


class Annotation(NamedTuple):
    """What is true of an item; the objects of generative ones, the answer of others."""

    item: str
    category: str
    truth: tuple[str, ...]
    hallu: tuple[str, ...]
    answer: str


class Amber(NamedTuple):
    """The benchmark's files: annotations by id, words of objects, words that are never wrong."""

    annotations: dict[str, Annotation]
    aliases: dict[str, tuple[str, ...]]
    safe: frozenset[str]


class Targets(NamedTuple):
    """Words in the official order of search, each with the position of the object that it names."""

    words: tuple[str, ...]
    position: dict[str, int]
    size: int


def read_amber(folder: Path) -> Amber:
    """Read `annotations.json`, `relation.json` and `safe_words.txt`.

    Raises:
        InputError: naming file and row, if one is missing or not as AMBER's.
    """
    aliases = _aliases(folder / "relation.json")
    annotations: dict[str, Annotation] = {}
    for record in read_records(folder / "annotations.json"):
        found = _annotation(record, aliases)
        if found.item in annotations:
            raise InputError(f"{record.where}: id {found.item} comes again")
        annotations[found.item] = found
    safe = frozenset(filter(None, map(str.strip, read_lines(folder / "safe_words.txt"))))
    return Amber(annotations, aliases, safe)


def generative_case(
    annotation: Annotation, answer: str, amber: Amber, *, strict: Strict, similar: Similar | None
) -> Case:
    """Score one description.

    Its nouns are its words whose singular is in the vocabulary, repetitions included. Like the
    official script, `official` minds capitals: "Dogs" at the start of a sentence is no noun.
    """
    truth, hallu = (
        _targets(names, amber.aliases) for names in (annotation.truth, annotation.hallu)
    )
    covered: set[int] = set()
    expected: set[int] = set()
    unsafe: list[Word] = []
    good: list[Word] = []
    nouns = list(_nouns(answer, amber.aliases, lower=strict == "fixed"))
    for noun in nouns:
        if noun.text in amber.safe:
            continue
        here = truth.position.get(noun.text)
        if here is None:
            expected |= _found(noun.text, hallu, similar)
            alike = {} if similar is None else _similar(noun.text, truth, similar)
            here = next(iter(alike), None)
        if here is None:
            unsafe.append(noun)
        else:
            covered.add(here)
            good.append(noun)
    spans = [Span(w.start, w.stop, "bad") for w in unsafe]
    spans += [Span(w.start, w.stop, "good") for w in good]
    return Case(
        item=annotation.item,
        question="",
        answer=answer,
        truth=", ".join(annotation.truth),
        verdict=", ".join(dict.fromkeys(word.text for word in unsafe)) or "nothing invented",
        badness=len(unsafe),
        counts={
            **{"answers": 1, "words": count_words(answer)},
            **{"nouns": len(nouns), "unsafe": len(unsafe), "hallucinated": bool(unsafe)},
            **{"truths": truth.size, "covered": len(covered)},
            **{"targets": hallu.size, "expected": len(expected)},
        },
        cluster=annotation.item,
        spans=sorted(spans),
    )


def discriminative_case(annotation: Annotation, answer: str, *, strict: Strict) -> Case:
    """Score one answer to a yes/no question."""
    official, fixed = amber_official(answer), read_yes_no(answer)
    said = official if strict == "official" else fixed
    right = said == annotation.answer
    kind, no = annotation.category, annotation.answer == "no"
    counts: dict[str, float] = {
        **{"answers": 1, "words": count_words(answer), "yes": said == "yes", "no": said == "no"},
        **{f"{kind}_asked": 1, f"{kind}_right": right, f"{kind}_truly_no": no},
        f"{kind}_no": said == "no",
        f"{kind}_right_no": right and no,
        "unclear": said is None,
        "read_differently": official != fixed,
    }
    return Case(
        item=annotation.item,
        question=f"({kind})",
        answer=answer,
        truth=annotation.answer,
        verdict=f"read as {said or 'neither'}, " + ("right" if right else "wrong"),
        badness=0 if right else 2 if said == "yes" and no else 1,
        counts=counts,
        cluster=annotation.item,
    )


def generative_scores(total: Counts) -> dict[str, float]:
    """Compute CHAIR, Cover, Hal and Cog in percent.

    Cog is over the annotated targets, as the script has it; the paper's is over mentioned objects.
    """
    answers = total["answers"]
    return {
        "chair": _percent(total["unsafe"], total["nouns"]),
        "cover": _percent(total["covered"], total["truths"]),
        "hal": round(100 - (answers - total["hallucinated"]) / (answers + START) * 100, 1),
        "cog": _percent(total["expected"], total["targets"]),
        "coverage": total["covered"] / (total["truths"] + START),
        "length": total["words"] / answers,
    }


def discriminative_scores(total: Counts) -> dict[str, float]:
    """Compute accuracy, precision, recall and F1 of "no" in percent, overall and per category.

    F1 is computed from rounded precision and recall, with 0.0001 (0.001 for existence) added to its
    denominator. Categories that nobody was asked about are left out, and so is the overall score
    unless all of them were.
    """
    found: dict[str, float] = {}
    asked = {kind for kind in GROUPS[""] if total.get(f"{kind}_asked")}
    for prefix, kinds in GROUPS.items():
        if not asked.issuperset(kinds):
            continue

        def summed(name: str, kinds: Sequence[str] = kinds) -> float:
            return sum(total[f"{kind}_{name}"] for kind in kinds)

        # The script starts each of the three attributes' denominators at 0.001, but the overall
        # one only once.
        start = START * (len(kinds) if prefix == "attribute_" else 1)
        accuracy = _percent(summed("right"), summed("asked"), start)
        precision = _percent(summed("right_no"), summed("no"), start)
        recall = _percent(summed("right_no"), summed("truly_no"), start)
        extra = 0.001 if prefix == "existence_" else 0.0001
        p, r = precision / 100, recall / 100
        f1 = round(2 * p * r / (p + r + extra) * 100, 1)
        names = ("accuracy", "precision", "recall", "f1")
        found |= {
            prefix + name: value
            for name, value in zip(names, (accuracy, precision, recall, f1), strict=True)
        }
    answers = total["answers"]
    rates = {name: total[f"{name}"] / answers for name in ("yes", "no")}
    return found | {
        "yes_rate": rates["yes"],
        "no_rate": rates["no"],
        "unclear": total["unclear"],
        "discriminative_length": total["words"] / answers,
    }


def always(metrics: Mapping[str, float]) -> dict[str, float]:
    """Add what is always shown: length, rates of yes and no, and coverage."""
    empty = dict.fromkeys(("length", "yes_rate", "no_rate", "coverage"), math.nan)
    return empty | dict(metrics)


def _percent(part: float, whole: float, start: float = START) -> float:
    return round(part / (whole + start) * 100, 1)


def _aliases(path: Path) -> dict[str, tuple[str, ...]]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected an object of word lists")
    for word, names in content.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{path}: {word!r} is not a list of words")
    return {word: tuple(names) for word, names in content.items()}


def _annotation(record: Record, aliases: Mapping[str, Any]) -> Annotation:
    item, kind = id_field(record, "id"), text_field(record, "type")
    if kind == "generative":
        names = []
        for side in ("truth", "hallu"):
            objects = record.fields.get(side)
            if not isinstance(objects, list) or not all(
                isinstance(name, str) and name in aliases for name in objects
            ):
                raise InputError(
                    f"{record.where}: {side!r} is not a list of words of relation.json"
                )
            names.append(tuple(objects))
        return Annotation(item, kind, names[0], names[1], "")
    if kind not in CATEGORY_OF_TYPE:
        raise InputError(f"{record.where}: unknown type {kind[:60]!r}")
    answer = text_field(record, "truth")
    if answer not in ("yes", "no"):
        raise InputError(f"{record.where}: truth {answer[:40]!r} is neither 'yes' nor 'no'")
    return Annotation(item, CATEGORY_OF_TYPE[kind], (), (), answer)


def _targets(names: Sequence[str], aliases: Mapping[str, Sequence[str]]) -> Targets:
    """List the words of objects as the official search goes: all aliases before all names.

    A word that names two objects counts for the first; a doubled object is covered once.
    """
    pairs = [(alias, i) for i, name in enumerate(names) for alias in aliases[name]]
    pairs += [(name, i) for i, name in enumerate(names)]
    position: dict[str, int] = {}
    for word, index in pairs:
        position.setdefault(word, index)
    return Targets(tuple(word for word, _ in pairs), position, len(names))


def _nouns(text: str, aliases: Mapping[str, Sequence[str]], *, lower: bool) -> Iterator[Word]:
    known = {*aliases, *(alias for names in aliases.values() for alias in names)}
    for word in words(text):
        read = lemma(word.text.lower() if lower else word.text, known)
        if read in known:
            yield Word(read, word.start, word.stop)


def _found(noun: str, targets: Targets, similar: Similar | None) -> set[int]:
    """Find the hallucination targets of a noun: the one it names, and the first alike."""
    found = {targets.position[noun]} if noun in targets.position else set()
    return found if similar is None else found | set(_similar(noun, targets, similar))


def _similar(noun: str, targets: Targets, similar: Similar) -> dict[int, None]:
    """Find the first word alike; empty when there is none."""
    for word in targets.words:
        if similar(noun, word):
            return {targets.position[word]: None}
    return {}
