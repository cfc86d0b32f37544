"""Questions about a scene, their exact answers, and reading a question back from English."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mmalign.shapes.scene import BACKGROUNDS, COLORS, SHAPES, SIZES, Scene, SceneObject
from mmalign.shapes.speech import SPOTS, Count, Fact, Ground, article, fact_of, spot

Asked = Literal["presence", "shape", "color", "size", "place", "what", "count", "background", "is"]
YES, NO = "Yes", "No"

_NOUN = (
    rf"(?:(?P<size>{'|'.join(SIZES)}) )?(?:(?P<color>{'|'.join(COLORS)}) )?"
    rf"(?P<shape>{'|'.join(SHAPES)}|object)"
)
_PLACE = f"(?P<place>{'|'.join(sorted(SPOTS, key=len, reverse=True))})"
_PATTERNS: dict[Asked, str] = {
    "presence": rf"Is there an? {_NOUN}(?: {_PLACE})?\?",
    "shape": rf"What shape is the {_NOUN}(?: {_PLACE})?\?",
    "color": rf"What color is the {_NOUN}(?: {_PLACE})?\?",
    "size": rf"What size is the {_NOUN}(?: {_PLACE})?\?",
    "place": rf"Where is the {_NOUN}\?",
    "what": rf"What is {_PLACE}\?",
    "count": r"How many objects are there\?",
    "background": r"What color is the background\?",
    "is": rf"Is the background (?P<ground>{'|'.join(BACKGROUNDS)})\?",
}
_QUESTIONS = {asked: re.compile(form, re.IGNORECASE) for asked, form in _PATTERNS.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """A question: what it asks for, and the object or background it names."""

    asked: Asked
    about: Fact | Ground | None = None

    @property
    def text(self) -> str:
        """The question in English."""
        if isinstance(self.about, Ground):
            return f"Is the background {self.about.color}?"
        if self.about is None:
            count = self.asked == "count"
            return "How many objects are there?" if count else "What color is the background?"
        noun, place = self.about.noun, f" {self.about.place}" if self.about.place else ""
        if self.asked == "presence":
            return f"Is there {article(noun)}{place}?"
        if self.asked == "what":
            return f"What is{place}?"
        if self.asked == "place":
            return f"Where is the {noun}?"
        return f"What {self.asked} is the {noun}{place}?"

    def answer(self, scene: Scene) -> str:
        """Answer truly: `Yes` or `No`, or a sentence.

        Where several objects fit the question, the leftmost is meant.
        """
        if self.asked == "count":
            return Count(len(scene.objects)).sentence()
        if self.asked == "background":
            return Ground(scene.background).sentence()
        if isinstance(self.about, Ground) or self.asked == "presence":
            return YES if self.about is not None and self.about.holds(scene) else NO
        about = self.about or Fact()
        fitting = sorted(filter(about.matches, scene.objects), key=lambda item: (item.x, item.y))
        if not fitting:
            return _absent(about).sentence()
        return _describe(self.asked, about, fitting[0])


def read_question(text: str) -> Query:
    """Read a question of the grammar, whatever its case.

    Raises:
        ValueError: the text is no question of the grammar.
    """
    for asked, pattern in _QUESTIONS.items():
        if found := pattern.fullmatch(text.strip()):
            groups = {k: v.lower() for k, v in found.groupdict().items() if v}
            if "ground" in groups:
                return Query(asked=asked, about=Ground(groups["ground"]))
            if groups.get("shape") == "object":
                del groups["shape"]
            named = asked not in ("count", "background")
            return Query(asked=asked, about=Fact(**groups) if named else None)  # type: ignore[arg-type]
    raise ValueError(f"not a question of Shapes world: {text!r}")


def presence(color: str, shape: str) -> Query:
    """Ask whether an object is there, as POPE does."""
    return Query(asked="presence", about=Fact(color=color, shape=shape))


def questions_about(fact: Fact) -> list[Query]:
    """Ask for every part of a fact, from all that it says besides that part.

    The first is the yes/no question of the whole fact; the others are wh-questions whose true
    answers would correct it.
    """
    queries = [Query(asked="presence", about=fact)]
    named = Fact(shape=fact.shape, color=fact.color)
    if fact.color:
        queries.append(Query(asked="shape", about=Fact(color=fact.color)))
    if fact.shape:
        queries.append(Query(asked="color", about=Fact(shape=fact.shape)))
    if fact.size and fact.name:
        queries.append(Query(asked="size", about=named))
    if fact.place:
        queries.append(Query(asked="what", about=Fact(place=fact.place)))
        if fact.name:
            queries.append(Query(asked="place", about=named))
    return queries


def _absent(about: Fact) -> Fact:
    return Fact(
        shape=about.shape, color=about.color, size=about.size, place=about.place, present=False
    )


def _describe(asked: Asked, about: Fact, item: SceneObject) -> str:
    """Answer a wh-question with what is true of an object that fits it."""
    if asked == "what":
        known = fact_of(item)
        return Fact(
            shape=known.shape, color=known.color, size=known.size, place=about.place
        ).sentence(1)
    values: dict[str, Callable[[], str]] = {
        "shape": lambda: article(item.shape),
        "color": lambda: item.color,
        "size": lambda: item.size,
        "place": lambda: spot(item),
    }
    return f"The {about.noun} is {values[asked]()}."
