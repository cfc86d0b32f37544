"""CHAIR and Object HalBench on captions counted by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mmalign.hallucination import chair, objhal
from mmalign.hallucination.captions import Caption, read_captions
from mmalign.hallucination.objects import read_coco, read_labels
from mmalign.hallucination.outcome import Outcome, worst_first
from mmalign.hallucination.vocabulary import coco_vocabulary
from mmalign.types import InputError

COCO = coco_vocabulary()
OBJECTS = {
    "1": frozenset({"dog", "person", "frisbee"}),
    "2": frozenset({"cat"}),
    "3": frozenset({"bus"}),
}
CAPTIONS = [
    # dog and man are there, the car and the second car are not: 2 of 4 mentions
    Caption("1", "", "A dog and a man near a car, and another car.", "row 1"),
    Caption("2", "", "Two cats sleep; the cat on the left is white.", "row 2"),
    Caption("3", "", "A street in the rain.", "row 3"),
]


def run(captions: list[Caption] = CAPTIONS, **options: Any) -> Outcome:
    return chair.evaluate(captions, OBJECTS, COCO, seed=0, resamples=50, **options)


def test_chair_by_hand() -> None:
    metrics = run().metrics
    assert metrics["chairs"] == metrics["chair_s"] == pytest.approx(1 / 3)
    assert metrics["chairi"] == metrics["chair_i"] == pytest.approx(2 / 6)
    # dog, person and cat of dog, person, frisbee, cat and bus
    assert metrics["recall"] == metrics["coverage"] == pytest.approx(3 / 5)
    assert metrics["length"] == pytest.approx((11 + 10 + 5) / 3)
    assert math.isnan(metrics["yes_rate"])


def test_worst_case_is_marked() -> None:
    (worst,) = worst_first(run().cases, 5)
    assert worst.item == "1"
    assert worst.verdict == "car"
    marked = [(worst.answer[span.start : span.stop], span.kind) for span in worst.spans]
    assert marked == [("dog", "good"), ("man", "good"), ("car", "bad"), ("car", "bad")]


def test_intervals_hold_the_value() -> None:
    outcome = run()
    for name, (low, high) in outcome.ci95.items():
        assert low <= outcome.metrics[name] <= high, name


def test_object_halbench_by_rule() -> None:
    metrics = objhal.evaluate(CAPTIONS, OBJECTS, COCO, listed=None, seed=0, resamples=50).metrics
    assert metrics["chairs"] == pytest.approx(1 / 3)
    assert metrics["chairs_refine"] == pytest.approx(1 / 2)  # the third caption names no object
    assert metrics["chairi"] == pytest.approx(2 / 6)
    assert metrics["obj_rec"] == pytest.approx(3 / 5)
    assert metrics["correct_rate"] == pytest.approx(1 / 2)
    assert metrics["object_correct_rate"] == pytest.approx(4 / 6)
    counted = ("sentence_num", "coco_sentence_num", "coco_word_count", "gt_word_count")
    assert [metrics[name] for name in counted] == [3, 2, 3, 5]
    assert metrics["avg_word_len"] == pytest.approx(26 / 3)


def test_paragraphs_hide_a_word_from_the_official_length() -> None:
    captions = [Caption("1", "", "A dog.\n\nA man.", "row 1")]
    metrics = objhal.evaluate(captions, OBJECTS, COCO, listed=None, seed=0, resamples=9).metrics
    assert metrics["avg_word_len"] == 3
    assert metrics["length"] == 4


def test_object_halbench_counts_listed_words_once() -> None:
    listed = [["dog", "brown dog", "Car", "car", "tree"], ["white cats", "coffee table"], []]
    outcome = objhal.evaluate(CAPTIONS, OBJECTS, COCO, listed=listed, seed=0, resamples=50)
    metrics = outcome.metrics
    assert metrics["chairi"] == pytest.approx(2 / 4)  # dog, car; cat, coffee table
    assert metrics["chairs_refine"] == 1
    assert metrics["coco_sentence_num"] == 2
    spans = [outcome.cases[0].answer[s.start : s.stop] for s in outcome.cases[0].spans]
    assert spans == ["dog", "car"]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('["dog", "cat"]', ["dog", "cat"]),
        ('Here:\n```json\n["dog"]\n```\nDone [1].', ["dog"]),
        ('Objects: ["a [x]"]', ["a [x]"]),
        ("[]", []),
    ],
)
def test_lists_of_objects_in_replies(reply: str, expected: list[str]) -> None:
    assert objhal.parse_objects(reply) == expected


@pytest.mark.parametrize("reply", ["", "dog, cat", "[1, 2]", '{"a": 1}', '["dog"', "[" * 9999])
def test_replies_without_a_list(reply: str) -> None:
    with pytest.raises(ValueError, match="no JSON list"):
        objhal.parse_objects(reply)


def test_short_answers_are_not_sent() -> None:
    assert objhal.request_for(Caption("1", "What?", "A brown dog", "")) is None
    request = objhal.request_for(Caption("1", "What {is} it?", "A {brown} dog runs", ""))
    assert request is not None
    assert "What {is} it?" in request
    assert "A {brown} dog runs" in request


def test_image_without_labels() -> None:
    with pytest.raises(InputError, match="row 9: image 9 has no labels"):
        run([Caption("9", "", "A dog", "row 9")])


ROWS = [
    {"image_id": 1, "caption": "a dog"},
    {"image_id": "COCO_val2014_000000000002.jpg", "caption": "b"},
]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("caps.jsonl", "\n".join(map(json.dumps, ROWS))),
        ("caps.json", json.dumps(ROWS)),
        ("caps.json", json.dumps({"overall": {}, "imgToEval": {"7": ROWS[0], "8": ROWS[1]}})),
        (
            "caps.json",
            json.dumps({"imgToEval": {"1": {"caption": "a dog"}, "2": ROWS[1]}}, indent=1),
        ),
    ],
)
def test_formats_of_captions(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    captions = read_captions(tmp_path / name)
    assert [(c.image, c.text) for c in captions] == [("1", "a dog"), ("2", "b")]


def test_doubled_image(tmp_path: Path) -> None:
    path = tmp_path / "caps.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [*ROWS, {"image_id": 1, "caption": "c"}]))
    with pytest.raises(InputError, match=r"line 3: id 1 comes again, first at .*line 1"):
        read_captions(path)


@pytest.mark.parametrize(
    "content",
    [
        '{"1": ["dog", "dining table"], "COCO_val2014_000000000002.jpg": ["TV"]}',
        '[{"image_id": 1, "objects": ["dogs", "table"]}, {"image_id": 2, "objects": ["tv"]}]',
        '{"image_id": 1, "objects": ["dog", "desk"]}\n{"image_id": "2", "objects": ["television"]}',
    ],
)
def test_formats_of_labels(tmp_path: Path, content: str) -> None:
    (tmp_path / "labels.json").write_text(content)
    found = read_labels(tmp_path / "labels.json", COCO)
    assert found == {"1": {"dog", "dining table"}, "2": {"tv"}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"1": ["unicorn"]}', "labels.json image 1: object 'unicorn' is not in the vocabulary"),
        ('{"1": "dog"}', "labels.json image 1: expected a list"),
        ('{"1": ["dog"], "01": ["cat"]}', "image 01: image 1 comes again"),
        ('{"1": ["dog"], "1": ["cat"]}', "'1' comes twice in one object"),
        ('{"image_id": 1, "objects": ["dog"]}\n{"image_id": 2}\n', "line 2: expected a list"),
        ("[]", "is empty"),
        ("{}", "is empty"),
        ('{"1": ["dog"', "line 1 column 13 is not JSON"),
    ],
)
def test_bad_labels(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_labels(tmp_path / "labels.json", COCO)


def coco_folder(folder: Path, *, captions: bool = True) -> Path:
    """COCO's annotations of two splits: 1 has a dog, a frisbee only in a caption; 2 nothing."""
    train: dict[str, Any] = {
        "images": [{"id": 1}, {"id": 5}],
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
        "annotations": [{"image_id": 1, "category_id": 18}, {"image_id": 5, "category_id": 3}],
    }
    val = {"images": [{"id": 2}], "categories": train["categories"], "annotations": []}
    (folder / "instances_train2014.json").write_text(json.dumps(train))
    (folder / "instances_val2014.json").write_text(json.dumps(val))
    if captions:
        said = {"annotations": [{"image_id": 1, "caption": "Catching frisbees"}, {"image_id": 9}]}
        (folder / "captions_train2014.json").write_text(json.dumps(said))
    return folder


def test_coco_annotations(tmp_path: Path) -> None:
    found, warnings = read_coco(coco_folder(tmp_path), {"1", "2"}, COCO)
    assert found == {"1": {"dog", "frisbee"}, "2": set()}
    assert warnings == []


def test_coco_annotations_without_captions(tmp_path: Path) -> None:
    found, (warning,) = read_coco(coco_folder(tmp_path, captions=False), {"1"}, COCO)
    assert found == {"1": {"dog"}}
    assert "captions" in warning


def test_bad_coco_annotations(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no instances_"):
        read_coco(tmp_path, {"1"}, COCO)
    (tmp_path / "instances_x.json").write_text('{"images": []}')
    with pytest.raises(InputError, match=r"instances_x\.json: 'categories' is not a list"):
        read_coco(tmp_path, {"1"}, COCO)
