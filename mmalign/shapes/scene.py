"""Scenes: what can stand in a picture of Shapes world, and how one is drawn at random.

A scene is one to four flat objects on a plain background. Every attribute is known exactly, which
is what makes the world useful: a picture can be checked against a prompt without any learned judge.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass

CANVAS = 64
SHAPES = ("circle", "square", "triangle", "star", "cross")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 225),
    "yellow": (250, 220, 50),
    "purple": (160, 60, 200),
    "orange": (245, 130, 20),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
    "black": (0, 0, 0),
}
SIZES: dict[str, tuple[float, float]] = {"small": (6.5, 8.0), "large": (10.5, 12.5)}
SIZE_BOUNDARY = 9.25
OBJECT_COUNT_WEIGHTS = (0.25, 0.4, 0.25, 0.1)
HELD_OUT_SHARE = 8  # one composition in eight is never drawn for training

_MARGIN = 2.0
_GAP = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneObject:
    """One object: `x`, `y` is its centre and `radius` its extent, in pixels of the canvas."""

    shape: str
    color: str
    x: float
    y: float
    radius: float

    @property
    def size(self) -> str:
        """`small` or `large`, by radius."""
        return "small" if self.radius < SIZE_BOUNDARY else "large"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """Objects on a background."""

    objects: tuple[SceneObject, ...]
    background: str

    @property
    def composition(self) -> str:
        """What the scene is made of, whatever the places: the unit of the train / held-out split.

        Two or more objects are told apart by their (color, shape) multiset; a single object, of
        which there are only thirty, also by its size and background.
        """
        parts = sorted(f"{item.color} {item.shape}" for item in self.objects)
        if len(self.objects) == 1:
            parts += [self.objects[0].size, self.background]
        return ", ".join(parts)

    @property
    def held_out(self) -> bool:
        """Whether this composition is reserved for evaluation."""
        digest = hashlib.blake2b(self.composition.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


def sample_scene(
    rng: random.Random, *, num_objects: int | None = None, held_out: bool | None = False
) -> Scene:
    """Draw a scene whose objects do not touch.

    Args:
        rng: source of all randomness.
        num_objects: 1 to 4; drawn from `OBJECT_COUNT_WEIGHTS` when omitted.
        held_out: draw only training compositions (False), only held-out ones (True) or any (None).
    """
    if num_objects is None:
        num_objects = rng.choices(range(1, 5), OBJECT_COUNT_WEIGHTS)[0]
    while True:
        objects = _place(rng, num_objects)
        scene = Scene(objects=objects, background=rng.choice(list(BACKGROUNDS)))
        if objects and (held_out is None or scene.held_out == held_out):
            return scene


def _place(rng: random.Random, count: int) -> tuple[SceneObject, ...]:
    """Rejection-sample `count` objects; empty when the canvas filled up first."""
    placed: list[SceneObject] = []
    for _ in range(40 * count):
        radius = rng.uniform(*SIZES[rng.choice(list(SIZES))])
        reach = radius + _MARGIN
        candidate = SceneObject(
            shape=rng.choice(SHAPES),
            color=rng.choice(list(COLORS)),
            x=rng.uniform(reach, CANVAS - reach),
            y=rng.uniform(reach, CANVAS - reach),
            radius=radius,
        )
        if _is_clear(candidate, placed):
            placed.append(candidate)
            if len(placed) == count:
                return tuple(placed)
    return ()


def _is_clear(candidate: SceneObject, placed: Iterable[SceneObject]) -> bool:
    return all(
        math.hypot(candidate.x - other.x, candidate.y - other.y)
        >= candidate.radius + other.radius + _GAP
        for other in placed
    )
