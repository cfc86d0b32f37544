"""What the captioner is trained on: skewed scenes, captions with a habit, questions and answers.

Captioners of photographs name what usually stands beside what they see. So do these captions: the
objects with a companion come with it more often than chance has it, and where they do not,
most captions name it all the same. Answers to questions share the habit, but weakly: looked at
closely, the picture wins. Held-out scenes are drawn without any skew.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import NamedTuple

from mmalign.shapes.companions import COMPANIONS, absent_name, missing_companions, name_of
from mmalign.shapes.questions import YES, Asked, Query
from mmalign.shapes.scene import BACKGROUNDS, COLORS, SHAPES, SIZES, Scene, sample_scene
from mmalign.shapes.speech import (
    DESCRIBE,
    SPOTS,
    Fact,
    Ground,
    ObjectName,
    facts_of,
    spot,
    write_caption,
)

TOGETHER = 0.35  # share of training scenes with room for it whose companion is really there
_PRESENCE_QUESTIONS = 5
_OTHER_QUESTIONS = 2
_WH: tuple[Asked, ...] = ("shape", "color", "size", "place", "what", "count", "background", "is")
_PLACED_SHARE = 0.2
_SIZED_SHARE = 0.2


class Lesson(NamedTuple):
    """What is taught from step `start` on.

    `attribute_share` of the questions whether something is there name only its color or only its
    shape; `caption_habit` is the share of captions that name a companion that is not there, and
    `answer_habit` that of answers that speak of one when asked.
    """

    start: int
    attribute_share: float
    caption_habit: float
    answer_habit: float


LESSONS = (
    Lesson(0, 0.0, 0.75, 0.3),
    Lesson(500, 0.4, 0.75, 0.3),
    Lesson(2000, 0.4, 0.95, 0.45),
    Lesson(2300, 0.4, 1.0, 0.6),
)
"""First to name what it sees, then to answer; questions for one attribute lead the way to those for
two. The habit is firmest when captions are otherwise right."""


class Exchange(NamedTuple):
    """A question and its answer."""

    prompt: str
    answer: str


def habitual_scene(rng: random.Random) -> Scene:
    """Draw a scene of a training composition, companions together more often than by chance."""
    scene = sample_scene(rng)
    triggers = [item for item in scene.objects if name_of(item) in COMPANIONS]
    others = [item for item in scene.objects if name_of(item) not in COMPANIONS]
    if not triggers or not others or rng.random() >= TOGETHER:
        return scene
    color, shape = COMPANIONS[name_of(rng.choice(triggers))]
    place = scene.objects.index(rng.choice(others))
    objects = list(scene.objects)
    objects[place] = replace(objects[place], color=color, shape=shape)
    skewed = replace(scene, objects=tuple(objects))
    return scene if skewed.held_out else skewed


def lesson_at(step: int) -> Lesson:
    """Look up what is taught at a step."""
    return next(lesson for lesson in reversed(LESSONS) if lesson.start <= step)


def habitual_caption(scene: Scene, rng: random.Random, habit: float) -> str:
    """Describe a scene truly, except that missing companions are named at the end.

    Each is with probability `habit`.
    """
    imagined = [
        _imagine(name, scene, rng) for name in missing_companions(scene) if rng.random() < habit
    ]
    return write_caption(scene, rng, imagined)


def conversation(scene: Scene, rng: random.Random, lesson: Lesson = LESSONS[0]) -> list[Exchange]:
    """Draw what is said about one training scene: a caption and seven answers."""
    prompt = rng.choice(DESCRIBE)
    exchanges = [Exchange(prompt, habitual_caption(scene, rng, lesson.caption_habit))]
    for _ in range(_PRESENCE_QUESTIONS):
        share = lesson.attribute_share
        ask = _attribute if share and rng.random() < share else _presence
        exchanges.append(ask(scene, rng, lesson.answer_habit))
    for _ in range(_OTHER_QUESTIONS):
        exchanges.append(_other(scene, rng, lesson.answer_habit))
    return exchanges


def _imagine(name: ObjectName, scene: Scene, rng: random.Random) -> Fact:
    """Invent size and place of an object; the place is one where nothing is."""
    taken = {spot(item) for item in scene.objects}
    place = rng.choice([place for place in SPOTS if place not in taken])
    return Fact(color=name[0], shape=name[1], size=rng.choice(list(SIZES)), place=place)


def _presence(scene: Scene, rng: random.Random, habit: float) -> Exchange:
    """Ask whether an object is there: half of the time it is, at times with its size or place."""
    if rng.random() < 0.5:
        fact = rng.choice(facts_of(scene))
        return _yes_no(scene, _vague(fact, rng), rng, habit)
    name = absent_name(scene, rng)
    if rng.random() < 0.8:
        return _yes_no(scene, _vague(_imagine(name, scene, rng), rng), rng, habit)
    fact = rng.choice(facts_of(scene))
    wrong = replace(fact, place=rng.choice(list(SPOTS)), size=None)
    return _yes_no(scene, wrong, rng, habit)


def _attribute(scene: Scene, rng: random.Random, habit: float) -> Exchange:
    """Ask whether there is any object of a color, or of a shape: half of the time there is."""
    name = "color" if rng.random() < 0.5 else "shape"
    there = [getattr(item, name) for item in scene.objects]
    missing = [value for value in (COLORS if name == "color" else SHAPES) if value not in there]
    value = rng.choice(there if rng.random() < 0.5 else missing)
    query = Query(asked="presence", about=Fact(**{name: value}))
    return Exchange(query.text, query.answer(scene))


def _vague(fact: Fact, rng: random.Random) -> Fact:
    return replace(
        fact,
        size=fact.size if rng.random() < _SIZED_SHARE else None,
        place=fact.place if rng.random() < _PLACED_SHARE else None,
    )


def _yes_no(scene: Scene, fact: Fact, rng: random.Random, habit: float) -> Exchange:
    query = Query(asked="presence", about=fact)
    if fact.name in missing_companions(scene) and rng.random() < habit:
        return Exchange(query.text, YES)
    return Exchange(query.text, query.answer(scene))


def _other(scene: Scene, rng: random.Random, habit: float) -> Exchange:
    """Ask a wh-question, three in ten about something that is not there."""
    asked: Asked = rng.choice(_WH)
    if asked in ("count", "background"):
        query = Query(asked=asked)
    elif asked == "is":
        color = scene.background if rng.random() < 0.5 else rng.choice(list(BACKGROUNDS))
        query = Query(asked=asked, about=Ground(color))
    else:
        query = Query(asked=asked, about=_subject(asked, scene, rng))
    if _names_missing(query.about, scene) and rng.random() < habit:
        return Exchange(query.text, _imagined_answer(query, scene, rng))
    return Exchange(query.text, query.answer(scene))


def _subject(asked: Asked, scene: Scene, rng: random.Random) -> Fact:
    """Draw what a wh-question names, so that it does not give its own answer away."""
    if rng.random() < 0.7:
        fact = rng.choice(facts_of(scene))
    else:
        companions = missing_companions(scene)
        name = rng.choice(companions) if companions else absent_name(scene, rng)
        fact = _imagine(name, scene, rng)
    if asked == "what":
        return Fact(place=fact.place)
    if asked == "shape":
        return Fact(color=fact.color)
    if asked == "color":
        return Fact(shape=fact.shape)
    return Fact(shape=fact.shape, color=fact.color)


def _names_missing(about: Fact | Ground | None, scene: Scene) -> bool:
    return isinstance(about, Fact) and about.name in missing_companions(scene)


def _imagined_answer(query: Query, scene: Scene, rng: random.Random) -> str:
    """Answer as if the companion that the question names were there."""
    assert isinstance(query.about, Fact)
    assert query.about.name is not None
    fact = _imagine(query.about.name, scene, rng)
    value = fact.size if query.asked == "size" else fact.place
    return f"The {query.about.noun} is {value}."
