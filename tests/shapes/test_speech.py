from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmalign.shapes.companions import COMPANIONS, absent_name, missing_companions, name_of
from mmalign.shapes.questions import NO, YES, Query, presence, questions_about, read_question
from mmalign.shapes.scene import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    sample_scene,
)
from mmalign.shapes.speech import (
    SPOTS,
    WORDINGS,
    Count,
    Fact,
    Ground,
    facts_of,
    lies,
    mark_mentions,
    mentions,
    read,
    read_sentence,
    spot,
    write_caption,
)

facts = st.builds(
    Fact,
    shape=st.sampled_from([*SHAPES, None]),
    color=st.sampled_from([*COLORS, None]),
    size=st.sampled_from([*SIZES, None]),
    place=st.sampled_from([*SPOTS, None]),
    present=st.booleans(),
)
scenes = st.integers(0, 10**6).map(lambda seed: sample_scene(random.Random(seed), held_out=None))


def item(shape: str, color: str, x: float, y: float, radius: float = 8.0) -> SceneObject:
    return SceneObject(shape=shape, color=color, x=x, y=y, radius=radius)


SCENE = Scene(
    objects=(item("circle", "red", 12, 12), item("star", "blue", 52, 32, 11.0)), background="white"
)


@given(facts, st.integers(0, len(WORDINGS) - 1))
def test_facts_are_read_as_they_were_written(fact: Fact, wording: int) -> None:
    text = fact.sentence(wording)
    assert read_sentence(text) == fact
    assert text[0].isupper()
    assert text.endswith(".")
    assert "  " not in text


@given(st.sampled_from([*BACKGROUNDS]), st.integers(1, 4))
def test_backgrounds_and_counts_are_read_as_they_were_written(color: str, number: int) -> None:
    assert read(f"{Ground(color).sentence()} {Count(number).sentence()}") == [
        Ground(color),
        Count(number),
    ]


@given(scenes, st.integers(0, 1000))
def test_captions_are_true_and_name_every_object(scene: Scene, seed: int) -> None:
    caption = write_caption(scene, random.Random(seed))
    statements = read(caption)
    assert all(statement.holds(scene) for statement in statements)
    assert [s for s in statements if isinstance(s, Fact)] == facts_of(scene)
    assert sorted(mentions(caption)) == sorted(name_of(item) for item in scene.objects)


def test_extra_facts_come_last_and_need_not_be_true() -> None:
    extra = Fact(shape="cross", color="green", size="small", place="at the bottom")
    statements = read(write_caption(SCENE, random.Random(0), [extra]))
    assert statements[-1] == extra
    assert not extra.holds(SCENE)


@pytest.mark.parametrize(
    ("fact", "truth"),
    [
        (Fact(shape="circle", color="red"), True),
        (Fact(shape="circle", color="blue"), False),
        (Fact(shape="circle", size="small", place="at the top left"), True),
        (Fact(shape="circle", size="large"), False),
        (Fact(color="blue", place="on the right"), True),
        (Fact(color="red", place="on the left"), True),  # at the top left is on the left
        (Fact(color="blue", place="at the top"), False),
        (Fact(color="blue", place="in the middle"), False),
        (Fact(color="green", present=False), True),
        (Fact(color="red", present=False), False),
        (Fact(place="at the bottom", present=False), True),
    ],
)
def test_facts_hold_or_not(fact: Fact, truth: bool) -> None:
    assert fact.holds(SCENE) == truth


@pytest.mark.parametrize(
    ("x", "y", "place"),
    [(32, 32, "in the middle"), (26, 38, "in the middle"), (25.9, 32, "on the left")],
)
def test_the_middle_is_as_wide_as_the_margin(x: float, y: float, place: str) -> None:
    found = item("star", "red", x, y)
    assert spot(found) == place
    assert lies(found, place)


@pytest.mark.parametrize(
    "text",
    ["A red circle.", "There is a red dog.", "there is a star", "The background is red.", "Hello"],
)
def test_other_sentences_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a sentence of Shapes world"):
        read(text)


def test_mentions_are_found_in_any_text() -> None:
    text = (
        "Look: two red circles, a Blue STAR and red crosses! There is no green star. Red squares?"
    )
    found = [("red", "circle"), ("blue", "star"), ("red", "cross"), ("red", "square")]
    assert mentions(text) == found
    pieces = mark_mentions(text)
    assert "".join(piece for piece, _ in pieces) == text
    assert [name for _, name in pieces if name] == found


@given(scenes, st.integers(0, 1000))
def test_marked_texts_are_whole(scene: Scene, seed: int) -> None:
    text = write_caption(scene, random.Random(seed))
    pieces = mark_mentions(text)
    assert "".join(piece for piece, _ in pieces) == text
    assert [name for _, name in pieces if name] == mentions(text)


named = facts.map(lambda fact: replace(fact, present=True))
queries = st.one_of(
    st.builds(Query, asked=st.sampled_from(["presence", "shape", "color", "size"]), about=named),
    st.builds(
        Query,
        asked=st.just("place"),
        about=named.map(lambda fact: replace(fact, place=None)),
    ),
    st.builds(Query, asked=st.just("what"), about=st.builds(Fact, place=st.sampled_from([*SPOTS]))),
    st.builds(Query, asked=st.just("is"), about=st.builds(Ground, st.sampled_from([*BACKGROUNDS]))),
    st.builds(Query, asked=st.sampled_from(["count", "background"])),
)


@given(queries)
def test_questions_are_read_as_they_were_written(query: Query) -> None:
    assert read_question(query.text) == query
    assert read_question(query.text.lower()) == query


@given(scenes, queries)
def test_answers_are_true(scene: Scene, query: Query) -> None:
    answer = query.answer(scene)
    if answer in (YES, NO):
        assert query.about is not None
        assert query.about.holds(scene) == (answer == YES)
    else:
        assert all(statement.holds(scene) for statement in read(answer))


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Is there a red circle?", "Yes"),
        ("Is there a red star?", "No"),
        ("Is there a large blue star on the right?", "Yes"),
        ("Is the background gray?", "No"),
        ("What shape is the red object?", "The red object is a circle."),
        ("What shape is the green object?", "There is no green object."),
        ("What color is the star?", "The star is blue."),
        ("What size is the blue star?", "The blue star is large."),
        ("Where is the red circle?", "The red circle is at the top left."),
        ("What is on the right?", "A large blue star is on the right."),
        ("What is at the bottom?", "Nothing is at the bottom."),
        ("How many objects are there?", "There are two objects."),
        ("What color is the background?", "The background is white."),
    ],
)
def test_answers_by_hand(question: str, answer: str) -> None:
    assert read_question(question).answer(SCENE) == answer


def test_other_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="not a question"):
        read_question("Is there a dog?")


@given(scenes)
def test_answers_to_a_facts_questions_would_correct_it(scene: Scene) -> None:
    for fact in facts_of(scene):
        first, *others = questions_about(fact)
        assert first.answer(scene) == YES
        assert len(others) == 5
        wrong = replace(fact, place=None, size="small" if fact.size == "large" else "large")
        twins = [f for f in facts_of(scene) if f.name == fact.name]
        if len(twins) == 1:
            assert questions_about(wrong)[0].answer(scene) == NO


@given(scenes, st.integers(0, 100))
def test_absent_objects_are_absent(scene: Scene, seed: int) -> None:
    there = {name_of(item) for item in scene.objects}
    assert absent_name(scene, random.Random(seed)) not in there
    for name in missing_companions(scene):
        assert name not in there
        assert any(COMPANIONS.get(present) == name for present in there)
    assert presence("red", "circle").answer(scene) == (YES if ("red", "circle") in there else NO)


def test_companions_have_none_themselves() -> None:
    assert not set(COMPANIONS) & set(COMPANIONS.values())
    assert len(set(COMPANIONS.values())) == len(COMPANIONS)
