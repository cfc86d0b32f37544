"""The exact jobs of topic overwriting: checked against the scene that a picture was drawn from."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from PIL import Image

from mmalign.shapes.render import render
from mmalign.shapes.scene import Scene, SceneObject, sample_scene
from mmalign.shapes.speech import fact_of, facts_of, read_sentence, write_caption
from mmalign.shapes.topics import (
    ShapesLabeller,
    ShapesRewriter,
    ShapesSplitter,
    ShapesTopicJudge,
    ShapesWriter,
)
from mmalign.topics.types import Check, RewriteRequest, Statement
from mmalign.types import ImageRef, InputError, Question

CIRCLE = SceneObject(shape="circle", color="red", x=14, y=14, radius=11)
STAR = SceneObject(shape="star", color="blue", x=50, y=50, radius=7)
SCENE = Scene(objects=(CIRCLE, STAR), background="gray")
PICTURE = render(SCENE)


def test_every_sentence_of_a_caption_is_a_fact() -> None:
    caption = write_caption(SCENE, random.Random(0), extra=[fact_of(STAR)])
    ((*facts,),) = ShapesSplitter().split([caption])
    assert " ".join(facts) in (caption, " ".join(dict.fromkeys(facts)))
    assert ShapesSplitter().split(["What a day. There is a red circle. I like it.", ""]) == [
        ["There is a red circle."],
        [],
    ]


@pytest.mark.parametrize(
    ("fact", "wh", "check"),
    [
        (
            "There is a large red circle at the top left.",
            "What is at the top left?",
            Check("Is there a large red circle at the top left?"),
        ),
        ("There is a red circle.", "Where is the red circle?", Check("Is there a red circle?")),
        (
            "Nothing is on the left.",
            "What is on the left?",
            Check("Is there an object on the left?", False),
        ),
        (
            "There is no red circle.",
            "Where is the red circle?",
            Check("Is there a red circle?", False),
        ),
        (
            "The background is gray.",
            "What color is the background?",
            Check("Is the background gray?"),
        ),
        ("There are two objects.", None, None),
        ("I like it.", None, None),
    ],
)
def test_questions_about_facts(fact: str, wh: str | None, check: Check | None) -> None:
    writer = ShapesWriter()
    assert writer.ask([[fact], []]) == [[wh], []]
    assert writer.verify([[Statement(fact, "What?")]]) == [[check]]
    assert writer.prompt("What is it?", fact) == "What is it?"


def test_labels_are_what_the_scene_says() -> None:
    """But for objects within a pixel of the middle, where the parser may see the other side."""
    rng, labeller, writer = random.Random(0), ShapesLabeller(), ShapesWriter()
    wrong, agree = 0, []
    for _ in range(100):
        scene, other = sample_scene(rng), sample_scene(rng)
        facts = [fact.sentence(rng.randrange(4)) for fact in facts_of(scene) + facts_of(other)]
        (checks,) = writer.verify([[Statement(fact) for fact in facts]])
        picture = render(scene)
        asked = [Question(check.question, (picture,)) for check in checks if check]
        labels = labeller.probabilities(asked)
        truth = [read_sentence(fact).holds(scene) for fact in facts]
        agree += [
            pair == ((1.0, 0.0) if t else (0.0, 1.0)) for pair, t in zip(labels, truth, strict=True)
        ]
        wrong += truth.count(False)
    assert sum(agree) >= 0.98 * len(agree)
    assert wrong > 100


def test_pictures_may_be_files(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.png")
    asked = Question("Is there a red circle?", (ImageRef(tmp_path / "a.png", "a.png"),))
    assert ShapesLabeller().probabilities([asked]) == [(1.0, 0.0)]


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (Question("Is it nice?", (PICTURE,)), "cannot read: not a question of Shapes world"),
        (Question("Is there a red star?", (Image.new("RGB", (9, 9)),)), "expected a 64 x 64"),
    ],
)
def test_what_is_not_of_this_world(question: Question, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ShapesLabeller().probabilities([question])


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("There is a red circle on the left.", "A blue star is on the left.", True),
        ("There is a red circle on the left.", "Nothing is on the left.", True),
        ("There is a red circle on the left.", "A red circle is on the right.", False),
        ("There is a red circle.", "A red circle is on the right.", True),
        ("There is a red circle.", "There is a red star.", False),
        ("The background is gray.", "The background is black.", True),
        ("The background is gray.", "There is a red star.", False),
        ("I like it.", "I like it.", False),
    ],
)
def test_topics_are_places_objects_and_the_background(first: str, second: str, same: bool) -> None:
    judge = ShapesTopicJudge()
    assert judge.same_topic([(first, second), (second, first)], "fact") == [same, same]
    assert judge.same_topic([("What is it?", "what is it?")], "question") == [True]
    assert judge.same_topic([("What is it?", "Where is it?")], "question") == [False]


ANSWER = "The background is gray. A red star is at the top left. A blue star is on the right."


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "A red star is at the top left.",
            "A large red circle is at the top left.",
            "The background is gray. A large red circle is at the top left. "
            "A blue star is on the right.",
        ),
        (  # rightly not there: the sentence goes
            "A red star is at the top left.",
            "There is no red star.",
            "The background is gray. A blue star is on the right.",
        ),
        (  # wrongly said not to be there: this is what the rejected side is to say
            "A red star is at the top left.",
            "Nothing is at the top left.",
            "The background is gray. Nothing is at the top left. A blue star is on the right.",
        ),
        (  # said already, in other words
            "A red star is at the top left.",
            "There is a blue star on the right.",
            "The background is gray. A blue star is on the right.",
        ),
        ("The sky is blue.", "It rains.", ANSWER),
    ],
)
def test_sentences_are_replaced(old: str, new: str, expected: str) -> None:
    request = RewriteRequest(Question("What is it?", (PICTURE,)), ANSWER, ((old, new),))
    assert ShapesRewriter().rewrite([request]) == [expected]
