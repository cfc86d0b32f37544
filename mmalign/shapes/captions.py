"""Descriptions of scenes: drawn from a scene, written as English, read back from English, checked.

The sentence grammar is small and unambiguous, so `parse_description` inverts `Description.text`
exactly. That is what lets a judge take nothing but (image, prompt).
"""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from mmalign.shapes.scene import BACKGROUNDS, CANVAS, COLORS, SHAPES, SIZES, Scene, SceneObject

RELATIONS = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}
"""Relation of the first object to the second: direction from first to second, y pointing down."""
PLACES = {
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
}
NUMBERS = {"two": 2, "three": 3, "four": 4}

_RELATION_MARGIN = 6.0  # pixels between centres before one object counts as left of another
PLACE_MARGIN = 6.0  # pixels from the canvas centre before an object counts as on the left
_SIZE_SHARE = 0.3
_RELATION_SHARE = 0.6
_PLACE_SHARE = 0.5
_BACKGROUND_SHARE = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectPhrase:
    """One object as a prompt names it; `size` is None where the prompt leaves it open."""

    shape: str
    color: str
    size: str | None = None

    @property
    def noun(self) -> str:
        """The phrase without its article, such as `large red circle`."""
        return " ".join(part for part in (self.size, self.color, self.shape) if part)

    def matches(self, item: SceneObject) -> bool:
        """Whether a scene object fits the phrase."""
        same = (item.shape, item.color) == (self.shape, self.color)
        return same and self.size in (None, item.size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """What a prompt claims: objects and, where stated, one relation or place and the background.

    `relation` holds between the first and the second object; `place` is that of a single object.
    """

    objects: tuple[ObjectPhrase, ...]
    relation: str | None = None
    place: str | None = None
    background: str | None = None

    @property
    def text(self) -> str:
        """The prompt."""
        if self.relation:
            first, second = self.objects
            body = f"{_article(first.noun)} {self.relation} {_article(second.noun)}"
        else:
            body = _enumerate([_counted(n, c) for n, c in self._counts().items()])
        place = f" {self.place}" if self.place else ""
        ground = f" on a {self.background} background" if self.background else ""
        return f"{body}{place}{ground}"

    def _counts(self) -> dict[str, int]:
        return dict(Counter(item.noun for item in self.objects))

    def claims(self, scene: Scene) -> dict[str, bool]:
        """Check every claim against a scene.

        Returns:
            A verdict per claim: one per object, `count` (no more and no fewer objects), and
            `relation`, `place` and `background` where the prompt states them.
        """
        assigned = _assign(self.objects, scene.objects)
        verdicts = {
            f"object {index + 1}: {phrase.noun}": found is not None
            for index, (phrase, found) in enumerate(zip(self.objects, assigned, strict=True))
        }
        verdicts["count"] = len(scene.objects) == len(self.objects)
        if self.relation:
            verdicts["relation"] = _related(self.relation, self.objects, scene.objects)
        if self.place:
            verdicts["place"] = assigned[0] is not None and _placed(self.place, assigned[0])
        if self.background:
            verdicts["background"] = scene.background == self.background
        return verdicts


def describe(scene: Scene, rng: random.Random) -> Description:
    """Draw a true description of a scene; what it mentions besides the objects is random."""
    items = list(scene.objects)
    rng.shuffle(items)
    phrases = tuple(
        ObjectPhrase(
            shape=item.shape,
            color=item.color,
            size=item.size if rng.random() < _SIZE_SHARE else None,
        )
        for item in items
    )
    relation = place = None
    if len(items) == 2 and rng.random() < _RELATION_SHARE:
        relation = _draw([name for name in RELATIONS if _holds(name, items[0], items[1])], rng)
    if len(items) == 1 and rng.random() < _PLACE_SHARE:
        place = _draw([name for name in PLACES if _placed(name, items[0])], rng)
    background = scene.background if rng.random() < _BACKGROUND_SHARE else None
    return Description(objects=phrases, relation=relation, place=place, background=background)


def parse_description(text: str) -> Description:
    """Read a prompt back into its claims.

    Raises:
        ValueError: the text is not a sentence of the grammar.
    """
    rest, background = _cut(text.strip(), r" on a (\w+) background$", BACKGROUNDS)
    rest, place = _cut(rest, rf" ({'|'.join(PLACES)})$", PLACES)
    parts = re.split(rf" ({'|'.join(RELATIONS)}) ", rest)
    if len(parts) == 3:
        phrases = _phrases(parts[0]) + _phrases(parts[2])
        return Description(objects=phrases, relation=parts[1], place=place, background=background)
    if len(parts) != 1:
        raise ValueError(f"not a Shapes world prompt: {text!r}")
    phrases = tuple(
        itertools.chain.from_iterable(_phrases(part) for part in re.split(r", | and ", rest))
    )
    return Description(objects=phrases, place=place, background=background)


def _draw(options: list[str], rng: random.Random) -> str | None:
    return rng.choice(options) if options else None


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _counted(noun: str, count: int) -> str:
    if count == 1:
        return _article(noun)
    word = {value: key for key, value in NUMBERS.items()}[count]
    return f"{word} {noun}{'es' if noun.endswith('s') else 's'}"


def _enumerate(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _cut(text: str, pattern: str, allowed: Collection[str]) -> tuple[str, str | None]:
    match = re.search(pattern, text)
    if match is None or match[1] not in allowed:
        return text, None
    return text[: match.start()], match[1]


def _phrases(text: str) -> tuple[ObjectPhrase, ...]:
    """Read `a large red circle` or `two red circles`."""
    words = text.split()
    count = NUMBERS.get(words[0], 1) if words else 0
    shape = words[-1] if words else ""
    if count > 1:
        shape = shape[:-2] if shape == "crosses" else shape.removesuffix("s")
    size = words[1] if len(words) == 4 else None
    valid = (
        len(words) in (3, 4)
        and (words[0] in ("a", "an") or words[0] in NUMBERS)
        and words[-2] in COLORS
        and shape in SHAPES
        and (size is None or size in SIZES)
    )
    if not valid:
        raise ValueError(f"not a Shapes world object: {text!r}")
    return (ObjectPhrase(shape=shape, color=words[-2], size=size),) * count


def _assign(
    phrases: tuple[ObjectPhrase, ...], items: tuple[SceneObject, ...]
) -> list[SceneObject | None]:
    """Give each phrase its own object so that most phrases have one."""
    best: list[SceneObject | None] = [None] * len(phrases)
    pool: list[SceneObject | None] = [*items, *[None] * len(phrases)]
    for choice in itertools.permutations(range(len(pool)), len(phrases)):
        found = [pool[index] for index in choice]
        kept = [
            item if item is not None and phrase.matches(item) else None
            for phrase, item in zip(phrases, found, strict=True)
        ]
        if sum(item is not None for item in kept) > sum(item is not None for item in best):
            best = kept
    return best


def _related(
    relation: str, phrases: tuple[ObjectPhrase, ...], items: tuple[SceneObject, ...]
) -> bool:
    return any(
        phrases[0].matches(a) and phrases[1].matches(b) and _holds(relation, a, b)
        for a, b in itertools.permutations(items, 2)
    )


def _holds(relation: str, first: SceneObject, second: SceneObject) -> bool:
    dx, dy = RELATIONS[relation]
    return (second.x - first.x) * dx + (second.y - first.y) * dy > _RELATION_MARGIN


def _placed(place: str, item: SceneObject) -> bool:
    dx, dy = PLACES[place]
    return (item.x - CANVAS / 2) * dx + (item.y - CANVAS / 2) * dy > PLACE_MARGIN
