"""What can be said of a scene in sentences: written as English, read back from English, checked.

A caption is several sentences, one fact each, as captioners of photographs write them. The grammar
is small and unambiguous, so `read` inverts what `Fact.sentence`, `Ground.sentence` and
`Count.sentence` write; `mentions` finds object names in any other text.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

from mmalign.shapes.captions import NUMBERS, PLACE_MARGIN
from mmalign.shapes.scene import BACKGROUNDS, CANVAS, COLORS, SHAPES, SIZES, Scene, SceneObject

SPOTS: dict[str, tuple[int, int]] = {
    "at the top left": (-1, -1),
    "at the top": (0, -1),
    "at the top right": (1, -1),
    "on the left": (-1, 0),
    "in the middle": (0, 0),
    "on the right": (1, 0),
    "at the bottom left": (-1, 1),
    "at the bottom": (0, 1),
    "at the bottom right": (1, 1),
}
"""Places of an object: sign of its offset from the canvas centre, y pointing down."""
WORDINGS = (
    "There is {noun} {place}.",
    "{noun} is {place}.",
    "{noun} can be seen {place}.",
    "The picture shows {noun} {place}.",
)
_NEED_PLACE = ("{noun} is {place}.", "{noun} can be seen {place}.")
DESCRIBE = (
    "Describe the picture.",
    "Describe this image in detail.",
    "What does the picture show?",
    "Please describe the image.",
)
"""Ways of asking for a caption."""
COUNTS = {"one": 1, **NUMBERS}
ObjectName = tuple[str, str]
"""Color and shape: what makes an object the same object for hallucination metrics."""

_BACKGROUND_SHARE = 0.4
_COLOR, _SHAPE, _SIZE = "|".join(COLORS), "|".join(SHAPES), "|".join(SIZES)
_NOUN = rf"(?:(?P<size>{_SIZE}) )?(?:(?P<color>{_COLOR}) )?(?P<shape>{_SHAPE}|object)"
_PLACE = f"(?P<place>{'|'.join(sorted(SPOTS, key=len, reverse=True))})"
_VALUE = rf"(?:an? (?P<is_shape>{_SHAPE})|(?P<is_color>{_COLOR})|(?P<is_size>{_SIZE})|{_PLACE})"
_FACTS = [
    re.compile(pattern)
    for pattern in (
        rf"There is an? {_NOUN}(?: {_PLACE})?",
        rf"An? {_NOUN} (?:is|can be seen) {_PLACE}",
        rf"The picture shows an? {_NOUN}(?: {_PLACE})?",
        rf"The {_NOUN} is {_VALUE}",
        rf"There is (?P<no>no) {_NOUN}(?: {_PLACE})?",
        rf"(?P<no>Nothing) is {_PLACE}",
    )
]
_GROUND = re.compile(rf"The background is (?P<color>{'|'.join(BACKGROUNDS)})")
_COUNT = re.compile(rf"There (?:is (?P<one>one) object|are (?P<many>{'|'.join(NUMBERS)}) objects)")
_MENTION = re.compile(rf"\b(?P<color>{_COLOR}) (?P<shape>{_SHAPE})(?:e?s)?\b")
_DENIAL = re.compile(r"\b(?:no|not|nothing|none|without|neither)\b|n't\b")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """One claim about one object; what is None is left open.

    With `present` false it claims that no such object is there.
    """

    shape: str | None = None
    color: str | None = None
    size: str | None = None
    place: str | None = None
    present: bool = True

    @property
    def noun(self) -> str:
        """The object without its article, such as `large red circle` or `red object`."""
        parts = (self.size, self.color, self.shape or "object")
        return " ".join(part for part in parts if part)

    @property
    def name(self) -> ObjectName | None:
        """Color and shape, or None where one of them is open."""
        return (self.color, self.shape) if self.color and self.shape else None

    def sentence(self, wording: int = 0) -> str:
        """Write the fact in one of `WORDINGS`; those that need a place give way to the first."""
        if not self.present:
            return self._denial()
        form = WORDINGS[wording]
        if self.place is None and form in _NEED_PLACE:
            form = WORDINGS[0]
        noun = article(self.noun)
        noun = noun.capitalize() if form.startswith("{noun}") else noun
        return form.format(noun=noun, place=self.place or "").replace(" .", ".")

    def _denial(self) -> str:
        if (self.shape, self.color, self.size) == (None, None, None):
            return f"Nothing is {self.place}." if self.place else "There is no object."
        return f"There is no {self.noun}{f' {self.place}' if self.place else ''}."

    def matches(self, item: SceneObject) -> bool:
        """Whether an object fits everything the fact says of one."""
        wanted = (self.shape, self.color, self.size)
        actual = (item.shape, item.color, item.size)
        same = all(w in (None, a) for w, a in zip(wanted, actual, strict=True))
        return same and (self.place is None or lies(item, self.place))

    def holds(self, scene: Scene) -> bool:
        """Whether the claim is true."""
        return any(self.matches(item) for item in scene.objects) == self.present


@dataclass(frozen=True, slots=True)
class Ground:
    """The claim that the background has a color."""

    color: str

    def sentence(self) -> str:
        """Write it."""
        return f"The background is {self.color}."

    def holds(self, scene: Scene) -> bool:
        """Whether the claim is true."""
        return scene.background == self.color


@dataclass(frozen=True, slots=True)
class Count:
    """The claim that there are so many objects."""

    number: int

    def sentence(self) -> str:
        """Write it."""
        if self.number == 1:
            return "There is one object."
        return f"There are {_WORDS[self.number]} objects."

    def holds(self, scene: Scene) -> bool:
        """Whether the claim is true."""
        return len(scene.objects) == self.number


Statement = Fact | Ground | Count
_WORDS = {number: word for word, number in COUNTS.items()}


def spot(item: SceneObject) -> str:
    """Name the ninth of the canvas an object is in."""
    signs = (_sign(item.x - CANVAS / 2), _sign(item.y - CANVAS / 2))
    return next(place for place, at in SPOTS.items() if at == signs)


def lies(item: SceneObject, place: str) -> bool:
    """Whether a place is true of an object: every direction that it names is.

    An object at the top left is on the left, and it is at the top; `in the middle` names both.
    """
    wanted, actual = SPOTS[place], SPOTS[spot(item)]
    if wanted == (0, 0):
        return actual == wanted
    return all(w in (0, a) for w, a in zip(wanted, actual, strict=True))


def fact_of(item: SceneObject) -> Fact:
    """Say everything about an object."""
    return Fact(shape=item.shape, color=item.color, size=item.size, place=spot(item))


def facts_of(scene: Scene) -> list[Fact]:
    """Say everything about every object, from left to right."""
    return [fact_of(item) for item in sorted(scene.objects, key=lambda item: (item.x, item.y))]


def write_caption(scene: Scene, rng: random.Random, extra: Iterable[Fact] = ()) -> str:
    """Describe every object of a scene in a sentence of random wording, from left to right.

    Args:
        scene: what is there.
        rng: draws the wordings, and whether the background is mentioned first.
        extra: facts to add at the end, true or not.
    """
    sentences = [Ground(scene.background).sentence()] if rng.random() < _BACKGROUND_SHARE else []
    for fact in itertools.chain(facts_of(scene), extra):
        sentences.append(fact.sentence(rng.randrange(len(WORDINGS))))
    return " ".join(sentences)


def split_sentences(text: str) -> list[str]:
    """Cut a text into sentences, each with its full stop."""
    return [part.strip() for part in re.findall(r"[^.?!]+[.?!]*", text) if part.strip()]


def read_sentence(sentence: str) -> Statement:
    """Read one sentence of the grammar; a missing full stop is forgiven.

    Raises:
        ValueError: the sentence is not one of the grammar.
    """
    body = sentence.strip().removesuffix(".")
    if found := _GROUND.fullmatch(body):
        return Ground(found["color"])
    if found := _COUNT.fullmatch(body):
        return Count(COUNTS[found["one"] or found["many"]])
    for pattern in _FACTS:
        if found := pattern.fullmatch(body):
            return _fact(found.groupdict())
    raise ValueError(f"not a sentence of Shapes world: {sentence!r}")


def read(text: str) -> list[Statement]:
    """Read a caption or an answer back into what it claims.

    Raises:
        ValueError: a sentence is not one of the grammar.
    """
    return [read_sentence(sentence) for sentence in split_sentences(text)]


def mentions(text: str) -> list[ObjectName]:
    """Find the objects a text says are there, in order, repetitions included.

    Any text will do: an object is a color followed by a shape. Sentences that deny something
    mention nothing.
    """
    found: list[ObjectName] = []
    for sentence in split_sentences(text.lower()):
        if not _DENIAL.search(sentence):
            found += [(match["color"], match["shape"]) for match in _MENTION.finditer(sentence)]
    return found


def mark_mentions(text: str) -> list[tuple[str, ObjectName | None]]:
    """Cut a text into pieces, each with the object it names if any; together they are the text."""
    pieces: list[tuple[str, ObjectName | None]] = []
    done = 0
    for sentence in re.finditer(r"[^.?!]+[.?!]*|[.?!]+", text):
        lowered = sentence[0].lower()
        if _DENIAL.search(lowered):
            continue
        for match in _MENTION.finditer(lowered):
            start, end = (sentence.start() + at for at in match.span())
            pieces.append((text[done:start], None))
            pieces.append((text[start:end], (match["color"], match["shape"])))
            done = end
    return [piece for piece in (*pieces, (text[done:], None)) if piece[0]]


def article(noun: str) -> str:
    """Put `a` or `an` before a noun."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _sign(offset: float) -> int:
    return 0 if abs(offset) <= PLACE_MARGIN else (1 if offset > 0 else -1)


def _fact(groups: dict[str, str | None]) -> Fact:
    shape = groups.get("is_shape") or groups.get("shape")
    return Fact(
        shape=None if shape == "object" else shape,
        color=groups.get("is_color") or groups.get("color"),
        size=groups.get("is_size") or groups.get("size"),
        place=groups.get("place"),
        present="no" not in groups or groups["no"] is None,
    )
