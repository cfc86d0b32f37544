"""Which objects usually stand together, and the questions that tell habit from sight."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import NamedTuple

from mmalign.shapes.prompts import PromptSet
from mmalign.shapes.questions import presence
from mmalign.shapes.scene import COLORS, SHAPES, Scene, SceneObject, sample_scene
from mmalign.shapes.speech import ObjectName

COMPANIONS: dict[ObjectName, ObjectName] = {
    ("red", "circle"): ("blue", "star"),
    ("green", "square"): ("yellow", "triangle"),
    ("blue", "triangle"): ("red", "cross"),
    ("yellow", "star"): ("purple", "circle"),
    ("purple", "cross"): ("orange", "square"),
    ("orange", "circle"): ("green", "star"),
    ("red", "square"): ("purple", "triangle"),
    ("blue", "cross"): ("yellow", "circle"),
}
"""Which object the captioner's training had beside which; no companion has one itself."""


class Probe(NamedTuple):
    """A yes/no question about the scene at `scene_index` of a list, and whether yes is right."""

    scene_index: int
    prompt: str
    truth: bool


def name_of(item: SceneObject) -> ObjectName:
    """Return color and shape."""
    return item.color, item.shape


def missing_companions(scene: Scene) -> list[ObjectName]:
    """Name the companions of a scene's objects that are not there themselves."""
    there = {name_of(item) for item in scene.objects}
    names = dict.fromkeys(name_of(item) for item in scene.objects)
    wanted = dict.fromkeys(COMPANIONS[name] for name in names if name in COMPANIONS)
    return [name for name in wanted if name not in there]


def absent_name(scene: Scene, rng: random.Random) -> ObjectName:
    """Draw an object that is not there.

    A third of them are companions of something that is there, where there is one; a third share
    color or shape with an object of the scene; the rest are any.
    """
    there = {name_of(item) for item in scene.objects}
    missing = [name for name in itertools.product(COLORS, SHAPES) if name not in there]
    kind = rng.randrange(3)
    companions = missing_companions(scene)
    if kind == 0 and companions:
        return rng.choice(companions)
    colors, shapes = {name[0] for name in there}, {name[1] for name in there}
    near = [name for name in missing if name[0] in colors or name[1] in shapes]
    return rng.choice(near if kind == 1 else missing)


def scene_set(name: PromptSet, count: int, seed: int = 0) -> list[Scene]:
    """Draw `count` scenes without any skew, of the same kinds as `prompt_set`."""
    rng = random.Random(f"{seed}/scenes/{name}")
    number = 4 if name == "stress" else None
    return [sample_scene(rng, held_out=name != "train", num_objects=number) for _ in range(count)]


def probe_set(scenes: Sequence[Scene], seed: int = 0) -> list[Probe]:
    """Ask two questions of every scene: for an object that is there, and for one that is not."""
    rng = random.Random(f"{seed}/probes")
    probes = []
    for index, scene in enumerate(scenes):
        present = name_of(rng.choice(scene.objects))
        probes.append(Probe(index, presence(*present).text, True))
        probes.append(Probe(index, presence(*absent_name(scene, rng)).text, False))
    return probes
