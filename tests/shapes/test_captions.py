from __future__ import annotations

import random

import pytest

from mmalign.shapes.captions import Description, ObjectPhrase, describe, parse_description
from mmalign.shapes.scene import Scene, SceneObject, sample_scene


def item(color: str, shape: str, x: float, y: float, radius: float = 7.0) -> SceneObject:
    return SceneObject(shape=shape, color=color, x=x, y=y, radius=radius)


SCENE = Scene(
    objects=(item("red", "circle", 15, 30), item("blue", "square", 45, 32, 11.0)),
    background="white",
)


def test_descriptions_of_a_scene_are_true_and_read_back() -> None:
    rng = random.Random(0)
    for _ in range(500):
        scene = sample_scene(rng)
        description = describe(scene, rng)
        read = parse_description(description.text)
        assert read.text == description.text
        assert all(read.claims(scene).values()), description.text


@pytest.mark.parametrize(
    ("text", "failing"),
    [
        ("a red circle left of a blue square", set()),
        ("a blue square left of a red circle", {"relation"}),
        ("a red circle and a small blue square", {"object 2: small blue square"}),
        ("a red circle and a blue star", {"object 2: blue star"}),
        ("a red circle", {"count"}),
        ("two red circles and a blue square", {"object 2: red circle", "count"}),
        ("a red circle and a blue square on a black background", {"background"}),
    ],
)
def test_claims_fail_one_by_one(text: str, failing: set[str]) -> None:
    claims = parse_description(text).claims(SCENE)
    assert {name for name, holds in claims.items() if not holds} == failing


def test_place_of_a_single_object() -> None:
    scene = Scene(objects=(item("red", "star", 15, 32),), background="gray")
    assert parse_description("a red star on the left").claims(scene)["place"]
    assert not parse_description("a red star at the top").claims(scene)["place"]


def test_every_object_needs_its_own_match() -> None:
    phrases = (
        ObjectPhrase(shape="circle", color="red"),
        ObjectPhrase(shape="circle", color="red", size="small"),
    )
    scene = Scene(
        objects=(item("red", "circle", 15, 30), item("red", "circle", 45, 30, 11.0)),
        background="white",
    )
    assert all(Description(objects=phrases).claims(scene).values())


@pytest.mark.parametrize("text", ["", "a cat", "a red circle near a blue square", "five red stars"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a Shapes world"):
        parse_description(text)
