"""Near misses: captions and scenes with one thing wrong, what the reward learns to tell apart."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from mmalign.shapes.captions import PLACES, RELATIONS, Description
from mmalign.shapes.scene import BACKGROUNDS, COLORS, SHAPES, SIZES, Scene, sample_scene

Subject = TypeVar("Subject", Description, Scene)
Edit = Callable[[Subject, random.Random], Subject]


def spoil(truth: Description, rng: random.Random, layout_share: float = 0.0) -> Description:
    """Change one claim of a description, so that it is a near miss rather than another scene.

    Of the descriptions that say where things are, `layout_share` get that turned around.
    """
    if layout_share and (truth.relation or truth.place) and rng.random() < layout_share:
        return _turn_relation(truth, rng) if truth.relation else _turn_place(truth, rng)
    edits: list[Edit[Description]] = [_recolor, _reshape, _drop_or_add]
    if len(truth.objects) > 1:
        edits.append(_swap_colors)
    if truth.relation:
        edits.append(_turn_relation)
    if truth.background:
        edits.append(_repaint)
    if any(item.size for item in truth.objects):
        edits.append(_resize)
    spoilt = truth
    while spoilt.text == truth.text:
        spoilt = rng.choice(edits)(truth, rng)
    return spoilt


def _with_object(subject: Subject, index: int, **changes: Any) -> Subject:
    objects = list(subject.objects)
    objects[index] = replace(objects[index], **changes)
    return replace(subject, objects=tuple(objects))


def _recolor(subject: Subject, rng: random.Random) -> Subject:
    return _with_object(
        subject, rng.randrange(len(subject.objects)), color=rng.choice(list(COLORS))
    )


def _reshape(subject: Subject, rng: random.Random) -> Subject:
    return _with_object(subject, rng.randrange(len(subject.objects)), shape=rng.choice(SHAPES))


def _resize(truth: Description, rng: random.Random) -> Description:
    sized = [index for index, item in enumerate(truth.objects) if item.size]
    return _with_object(truth, rng.choice(sized), size=rng.choice(list(SIZES)))


def _swap_colors(truth: Description, rng: random.Random) -> Description:
    first, second = rng.sample(range(len(truth.objects)), 2)
    swapped = _with_object(truth, first, color=truth.objects[second].color)
    return _with_object(swapped, second, color=truth.objects[first].color)


def _turn_relation(truth: Description, rng: random.Random) -> Description:
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert truth.relation in RELATIONS
    return replace(truth, relation=opposite[truth.relation])


def _turn_place(truth: Description, rng: random.Random) -> Description:
    assert truth.place in PLACES
    x, y = PLACES[truth.place]
    opposite = {direction: name for name, direction in PLACES.items()}
    return replace(truth, place=opposite[-x, -y])


def _repaint(subject: Subject, rng: random.Random) -> Subject:
    return replace(subject, background=rng.choice(list(BACKGROUNDS)))


def _drop_or_add(truth: Description, rng: random.Random) -> Description:
    objects = list(truth.objects)
    if len(objects) > 1 and rng.random() < 0.5:
        objects.pop(rng.randrange(len(objects)))
    elif len(objects) < 4:
        color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
        objects.append(replace(objects[0], color=color, shape=shape, size=None))
    relation = truth.relation if len(objects) == 2 else None
    place = truth.place if len(objects) == 1 else None
    return replace(truth, objects=tuple(objects), relation=relation, place=place)


def spoil_scene(scene: Scene, truth: Description, rng: random.Random) -> Scene:
    """Change one thing of a scene: `truth` no longer describes it, or it is no clean scene."""
    edits: list[Edit[Scene]] = [_recolor, _reshape, _other_size, _moved]
    edits += [_one_less, _one_more, _covered, _repaint]
    for _ in range(20):
        edit = rng.choice(edits)
        spoilt = edit(scene, rng)
        if edit is _covered or not all(truth.claims(spoilt).values()):
            return spoilt
    return _covered(scene, rng)


def _other_size(scene: Scene, rng: random.Random) -> Scene:
    radius = rng.uniform(*SIZES[rng.choice(list(SIZES))])
    return _with_object(scene, rng.randrange(len(scene.objects)), radius=radius)


def _moved(scene: Scene, rng: random.Random) -> Scene:
    """Take the places of another scene with as many objects."""
    places = sample_scene(rng, num_objects=len(scene.objects), held_out=None).objects
    items = [
        replace(item, x=place.x, y=place.y)
        for item, place in zip(scene.objects, places, strict=True)
    ]
    return replace(scene, objects=tuple(items))


def _one_less(scene: Scene, rng: random.Random) -> Scene:
    items = list(scene.objects)
    items.pop(rng.randrange(len(items)))
    return replace(scene, objects=tuple(items))


def _one_more(scene: Scene, rng: random.Random) -> Scene:
    extra = sample_scene(rng, num_objects=1, held_out=None).objects
    return replace(scene, objects=(*scene.objects, *extra))


def _covered(scene: Scene, rng: random.Random) -> Scene:
    """Melt one object with another that stands half over it."""
    item = rng.choice(scene.objects)
    (other,) = sample_scene(rng, num_objects=1, held_out=None).objects
    angle = rng.uniform(0, 2 * math.pi)
    x = item.x + 0.6 * item.radius * math.cos(angle)
    y = item.y + 0.6 * item.radius * math.sin(angle)
    return replace(scene, objects=(*scene.objects, replace(other, x=x, y=y)))
