"""Which objects usually stand together, and the questions that tell habit from sight."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from mmalign.shapes.prompts import PromptSet
from mmalign.shapes.questions import Query, presence
from mmalign.shapes.scene import COLORS, SHAPES, SIZES, Scene, SceneObject, sample_scene
from mmalign.shapes.speech import SPOTS, Fact, ObjectName, facts_of

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
    """A yes/no question about the scene at `scene_index` of a list, and whether yes is right.

    It asks for the `existence` of an object, or for an `attribute` of one: its size or place.
    """

    scene_index: int
    prompt: str
    truth: bool
    kind: Literal["existence", "attribute"] = "existence"


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
    kind = rng.randrange(3)
    companions = missing_companions(scene)
    if kind == 0 and companions:
        return rng.choice(companions)
    return rng.choice(_near(scene) if kind == 1 else _missing(scene))


def scene_set(name: PromptSet, count: int, seed: int = 0) -> list[Scene]:
    """Draw `count` scenes without any skew, of the same kinds as `prompt_set`."""
    rng = random.Random(f"{seed}/scenes/{name}")
    number = 4 if name == "stress" else None
    return [sample_scene(rng, held_out=name != "train", num_objects=number) for _ in range(count)]


def tempting_name(scene: Scene, rng: random.Random) -> ObjectName:
    """Draw an object that is not there but might well be.

    It is a companion of something that is there, or else one that shares color or shape with an
    object of the scene.
    """
    return rng.choice(missing_companions(scene) or _near(scene))


def _attribute_facts(scene: Scene, rng: random.Random) -> tuple[Fact, Fact]:
    """Draw a true size or place of an object, and a false one."""
    fact = rng.choice(facts_of(scene))
    named = Fact(color=fact.color, shape=fact.shape)
    sizes = [replace(named, size=size) for size in SIZES]
    places = [replace(named, place=place) for place in SPOTS]
    false = [[f for f in facts if not f.holds(scene)] for facts in (sizes, places)]
    # Two objects of one name may have both sizes; no two are everywhere.
    about_size = bool(false[0]) and rng.random() < 0.5
    true = replace(named, size=fact.size) if about_size else replace(named, place=fact.place)
    return true, rng.choice(false[0] if about_size else false[1])


def _missing(scene: Scene) -> list[ObjectName]:
    there = {name_of(item) for item in scene.objects}
    return [name for name in itertools.product(COLORS, SHAPES) if name not in there]


def _near(scene: Scene) -> list[ObjectName]:
    colors = {item.color for item in scene.objects}
    shapes = {item.shape for item in scene.objects}
    return [name for name in _missing(scene) if name[0] in colors or name[1] in shapes]


def probe_set(scenes: Sequence[Scene], seed: int = 0) -> list[Probe]:
    """Ask four questions of every scene; yes is right for the first and the third.

    Two are about existence: of an object that is there, and of a tempting one. So does POPE's
    adversarial split (Li et al. 2023, arXiv 2305.10355), which asks for the absent objects that
    most often stand beside the present ones. Two are about the size or the place of an object that
    is there, a kind of question that AMBER (Wang et al. 2023, arXiv 2311.07397) has.
    """
    rng = random.Random(f"{seed}/probes")
    probes = []
    for index, scene in enumerate(scenes):
        present = name_of(rng.choice(scene.objects))
        probes.append(Probe(index, presence(*present).text, True))
        probes.append(Probe(index, presence(*tempting_name(scene, rng)).text, False))
        for fact in _attribute_facts(scene, rng):
            query = Query(asked="presence", about=fact)
            probes.append(Probe(index, query.text, fact.holds(scene), "attribute"))
    return probes
