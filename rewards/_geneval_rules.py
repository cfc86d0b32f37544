"""GenEval's rules: which objects, how many, what colour, where.

Ghosh et al. 2023, "GenEval: an object-focused framework for evaluating text-to-image alignment",
section 3. Pure functions on detections; nothing here knows a network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mmalign.data.files import read_jsonl
from mmalign.data.schema import RowError
from mmalign.types import InputError

COLORS = (
    *("red", "orange", "yellow", "green", "blue"),
    *("purple", "pink", "brown", "black", "white"),
)
RELATIONS = ("left of", "right of", "above", "below")
Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


class Found(NamedTuple):
    """An object in an image; `mask` (H, W) bool where the detector makes one."""

    box: Box
    score: float
    mask: Tensor | None = None


Objects = Mapping[str, Sequence[Found]]
"""Detections by class name."""


@dataclass(frozen=True)
class Wanted:
    """One clause of a prompt: at least `count` objects of a class, perhaps coloured or placed.

    `position` is a relation and the number of the clause whose objects it is about.
    """

    name: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Requirements:
    """What a prompt asks for; of an excluded class there must be fewer than `count`."""

    include: tuple[Wanted, ...]
    exclude: tuple[Wanted, ...]
    counting: bool


@dataclass(frozen=True)
class Rules:
    """Thresholds, with GenEval's values.

    Attributes:
        threshold: least confidence of an object.
        counting_threshold: the same where the prompt says how many.
        max_objects: most objects of a class.
        max_overlap: intersection over union from which the weaker of two objects of a class is
            dropped; 1 keeps all.
        position_threshold: share of the objects' sizes by which they must be apart.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_threshold: float = 0.1

    def lowest(self) -> float:
        """Return the least confidence that any prompt asks for."""
        return min(self.threshold, self.counting_threshold)

    def kept(self, objects: Objects, *, counting: bool) -> dict[str, list[Found]]:
        """Keep the confident, the first `max_objects` and what does not overlap, best first."""
        least = self.counting_threshold if counting else self.threshold
        result = {}
        for name, found in objects.items():
            rest = sorted((f for f in found if f.score > least), key=lambda f: -f.score)
            rest, chosen = rest[: self.max_objects], []
            while rest:
                best, *rest = rest
                chosen.append(best)
                if self.max_overlap < 1:
                    rest = [f for f in rest if overlap(best.box, f.box) < self.max_overlap]
            if chosen:
                result[name] = chosen
        return result


def check(
    requirements: Requirements,
    objects: Objects,
    rules: Rules,
    name_colors: Callable[[Sequence[Found], str], Sequence[str]],
) -> list[bool]:
    """Check every requirement of a prompt on the objects that are kept.

    Args:
        requirements: of the prompt.
        objects: detections by class.
        rules: thresholds.
        name_colors: names the colour of objects of a class.

    Returns:
        One entry per count, colour, position and excluded class; GenEval calls an image correct if
        all are met. A position is not met where the objects or those it is about are missing.
    """
    kept = rules.kept(objects, counting=requirements.counting)
    groups: list[Sequence[Found] | None] = []
    results = []
    for wanted in requirements.include:
        found = kept.get(wanted.name, [])[: wanted.count]
        met = [len(found) == wanted.count]
        if wanted.color is not None:
            colors = name_colors(found, wanted.name) if met[0] else []
            met.append(list(colors).count(wanted.color) >= wanted.count)
        if wanted.position is not None:
            relation, target = wanted.position
            others = groups[target]
            met.append(
                all(met)
                and others is not None
                and all(
                    relation in relations(one.box, other.box, rules.position_threshold)
                    for one in found
                    for other in others
                )
            )
        groups.append(found if all(met) else None)
        results += met
    excluded = [len(kept.get(w.name, [])) < w.count for w in requirements.exclude]
    return results + excluded


def overlap(one: Box, other: Box) -> float:
    """Compute intersection over union, pixels at both ends of a side included."""
    shared = (
        *(max(a, b) for a, b in zip(one[:2], other[:2], strict=True)),
        *(min(a, b) for a, b in zip(one[2:], other[2:], strict=True)),
    )
    both = _area(shared)
    either = _area(one) + _area(other) - both
    return both / either if either else 0.0


def relations(one: Box, other: Box, threshold: float) -> set[str]:
    """Say where `one` is relative to `other`.

    The offset of the centres, per axis, less `threshold` times both sizes; what remains must be
    more than half of the centres' distance in a direction.
    """
    offset = [(one[i] + one[i + 2]) / 2 - (other[i] + other[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(one[i + 2] - one[i]) + abs(other[i + 2] - other[i]) for i in (0, 1)]
    rest = [
        max(abs(o) - threshold * s, 0) * (1 if o > 0 else -1)
        for o, s in zip(offset, sizes, strict=True)
    ]
    if all(abs(part) < 1e-3 for part in rest):
        return set()
    distance = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    dx, dy = (part / distance for part in rest)
    said = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, holds in said.items() if holds}


def read_requirements(path: Path) -> dict[str, Requirements]:
    """Read GenEval's `evaluation_metadata.jsonl`, by prompt.

    Raises:
        InputError: naming the line, for a row that is not of that format.
    """
    found: dict[str, Requirements] = {}
    for number, row in read_jsonl(path):
        try:
            if isinstance(row, RowError):
                raise row
            include = tuple(_wanted(clause, i) for i, clause in enumerate(row["include"]))
            exclude = tuple(_wanted(clause, 0) for clause in row.get("exclude", []))
            if not isinstance(row["prompt"], str) or not include:
                raise RowError("needs a prompt and something to include")
            found[row["prompt"]] = Requirements(include, exclude, row.get("tag") == "counting")
        except (RowError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} line {number}: is no row of GenEval's metadata: "
                f"{type(error).__name__}: {error}"
            ) from error
    if not found:
        raise InputError(f"{path} has no rows")
    return found


def _wanted(clause: dict[str, Any], place: int) -> Wanted:
    color, position = clause.get("color"), clause.get("position")
    if color is not None and color not in COLORS:
        raise RowError(f"color {color!r} is none of {', '.join(COLORS)}")
    if position is not None:
        relation, target = position
        if relation not in RELATIONS or target not in range(place):
            raise RowError(f"position {position!r} is no relation to an earlier object")
        position = (relation, target)
    count = clause["count"]
    if not isinstance(clause["class"], str) or not isinstance(count, int) or count < 1:
        raise RowError(f"{clause!r} needs a class and a count of 1 or more")
    return Wanted(clause["class"], count, color, position)


def _area(box: Sequence[float]) -> float:
    return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)
