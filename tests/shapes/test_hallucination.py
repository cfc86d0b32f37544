from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmalign.shapes.companions import missing_companions, probe_set, scene_set
from mmalign.shapes.hallucination import (
    caption_changes,
    caption_metrics,
    caption_scores,
    check_caption,
    mark_caption,
    question_changes,
    question_metrics,
    read_yes_no,
)
from mmalign.shapes.questions import YES, read_question
from mmalign.shapes.scene import Scene, SceneObject, sample_scene
from mmalign.shapes.speech import write_caption
from mmalign.types import InputError

SCENE = Scene(
    objects=(
        SceneObject(shape="circle", color="red", x=12, y=12, radius=8),
        SceneObject(shape="star", color="blue", x=50, y=50, radius=11),
    ),
    background="white",
)


def test_a_caption_is_checked_by_hand() -> None:
    check = check_caption(SCENE, "There is a red circle. A red circle and two green stars.")
    assert check.mentioned == (("red", "circle"), ("red", "circle"), ("green", "star"))
    assert check.hallucinated == (("green", "star"),)
    assert (check.covered, check.present, check.words) == (1, 2, 12)


def test_metrics_by_hand() -> None:
    captions = [
        "A red circle and a blue star.",
        "A red circle, a red circle and a green cross.",
        "Nothing.",
        "A green cross, a green cross and a green star.",
    ]
    measured = {k: v.value for k, v in caption_metrics([SCENE] * 4, captions).items()}
    assert measured == {"chair_s": 2 / 4, "chair_i": 4 / 8, "coverage": 3 / 8, "length": 28 / 4}


def test_saying_nothing_is_no_hallucination_and_no_coverage() -> None:
    measured = caption_metrics([SCENE], [""])
    assert all(interval.value == 0 for interval in measured.values())


@given(st.integers(0, 10**6))
def test_true_captions_are_perfect(seed: int) -> None:
    rng = random.Random(seed)
    scene = sample_scene(rng, held_out=None)
    measured = caption_metrics([scene], [write_caption(scene, rng)], resamples=2)
    assert [measured[name].value for name in ("chair_s", "chair_i", "coverage")] == [0, 0, 1]


def test_intervals_are_as_wide_as_the_binomial_says() -> None:
    captions = ["A green cross."] * 40 + ["A red circle."] * 60
    value, (low, high) = caption_metrics([SCENE] * 100, captions)["chair_s"]
    assert value == 0.4
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.4 * 0.6 / 100), rel=0.15)


def test_changes_are_paired_by_scene() -> None:
    """Half of the captions gain a hallucination, the others stay: half, whatever rows are drawn."""
    before = ["A red circle.", "A green cross."] * 50
    after = ["A red circle and a green star.", "A green cross."] * 50
    changed = caption_changes([SCENE] * 100, before, after)
    assert changed["chair_s"].value == 0.5
    low, high = changed["chair_s"].ci95
    assert 0.35 < low < 0.5 < high < 0.65
    assert changed["coverage"] == (0.0, (0.0, 0.0))
    assert changed["length"].value == 2.0
    assert question_changes([True, False], ["Yes", "Yes"], ["Yes", "No"])["yes_rate"].value == -0.5


def test_scores_are_f1_of_objects() -> None:
    captions = ["A red circle.", "A red circle and a blue star.", "A green cross.", "Hello."]
    assert caption_scores([SCENE] * 4, captions) == [2 / 3, 1.0, 0.0, 0.0]


def test_answers_are_measured_by_hand() -> None:
    answers = ["Yes", "no.", "Yes, there is.", "maybe yes", ""]
    measured = question_metrics([True, True, False, True, False], answers)
    assert measured["yes_no_accuracy"].value == 1 / 5
    assert measured["yes_rate"].value == 2 / 5


@pytest.mark.parametrize(
    ("answer", "read"),
    [("Yes", True), ("NO, it is not", False), ("No.", False), ("Nothing", None), ("", None)],
)
def test_answers_are_read_by_their_first_word(answer: str, read: bool | None) -> None:
    assert read_yes_no(answer) is read


@pytest.mark.parametrize("captions", [[], ["one", "two"]])
def test_missing_captions_are_refused(captions: list[str]) -> None:
    with pytest.raises(InputError, match="captions for 1"):
        caption_metrics([SCENE], captions)
    with pytest.raises(InputError, match="answers for 1"):
        question_metrics([True], captions)


def test_hallucinated_words_are_marked() -> None:
    text = "There is a red circle at the top. A green star is here."
    marked = mark_caption(SCENE, text)
    assert "".join(piece for piece, _ in marked) == text
    assert [(piece, there) for piece, there in marked if there is not None] == [
        ("red circle", True),
        ("green star", False),
    ]


def test_probes_are_half_there() -> None:
    scenes = scene_set("held_out", 200, seed=3)
    assert all(scene.held_out for scene in scenes)
    probes = probe_set(scenes)
    assert len(probes) == 800
    for kind in ("existence", "attribute"):
        truths = [probe.truth for probe in probes if probe.kind == kind]
        assert (len(truths), sum(truths)) == (400, 200)
    for probe in probes:
        scene = scenes[probe.scene_index]
        assert (read_question(probe.prompt).answer(scene) == YES) == probe.truth
        if probe.kind == "attribute":
            continue
        name = tuple(probe.prompt.removesuffix("?").split()[-2:])
        there = {(item.color, item.shape) for item in scenes[probe.scene_index].objects}
        assert (name in there) == probe.truth
        tempting = missing_companions(scenes[probe.scene_index])
        assert probe.truth or not tempting or name in tempting
    assert scene_set("held_out", 5, seed=3) == scenes[:5]
    assert scene_set("held_out", 5, seed=4) != scenes[:5]
    assert all(not scene.held_out for scene in scene_set("train", 20))
