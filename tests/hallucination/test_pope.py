"""POPE: the official script's numbers, rows that are missing or doubled, and the two readings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmalign.hallucination import pope
from mmalign.hallucination.outcome import Outcome
from mmalign.types import InputError

SHARED = Path(__file__).parents[3] / "shared"
GOLDEN: dict[str, dict[str, float]] = {
    "random": {
        "tp": 1378, "fp": 953, "tn": 547, "fn": 122, "accuracy": 0.6416666666666667,
        "precision": 0.5911625911625912, "recall": 0.9186666666666666,
        "f1": 0.7193944139911251, "yes_ratio": 0.777,
    },
    "popular": {
        "tp": 1383, "fp": 950, "tn": 550, "fn": 117, "accuracy": 0.6443333333333333,
        "precision": 0.5927989712816116, "recall": 0.922,
        "f1": 0.7216279676493608, "yes_ratio": 0.7776666666666666,
    },
    "adversarial": {
        "tp": 1403, "fp": 931, "tn": 569, "fn": 97, "accuracy": 0.6573333333333333,
        "precision": 0.6011139674378749, "recall": 0.9353333333333333,
        "f1": 0.7318727177882107, "yes_ratio": 0.778,
    },
}  # fmt: skip
"""What the official script prints for the answers of `../shared/golden`."""


def label(number: int, name: str, truth: str, image: int = 1) -> dict[str, Any]:
    text = f"Is there a {name} in the image?"
    return {
        "question_id": number,
        "image": f"COCO_val2014_{image:012}.jpg",
        "text": text,
        "label": truth,
    }


LABELS = [
    label(1, "dog", "yes"),
    label(2, "cat", "no"),
    label(3, "bus", "yes", 2),
    label(4, "car", "no", 2),
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def run(
    folder: Path, answers: list[dict[str, Any]], strict: Any = "official", on_missing: Any = "stop"
) -> Outcome:
    labels = write(folder / "labels.json", LABELS)
    questions = pope.read_questions(labels)
    path = write(folder / "answers.jsonl", answers)
    found, _ = pope.read_answers(path, questions, labels, on_missing)
    return pope.evaluate(questions, found, strict=strict, seed=0, resamples=20)


def said(*answers: str) -> list[dict[str, Any]]:
    return [{"question": q["text"], "answer": a} for q, a in zip(LABELS, answers, strict=True)]


@pytest.mark.parametrize("split", GOLDEN)
def test_scores_of_the_official_counts(split: str) -> None:
    expected = GOLDEN[split]
    total = {name: expected[name] for name in ("tp", "fp", "tn", "fn")}
    total |= {"answers": 3000, "words": 9000, "yes": expected["tp"] + expected["fp"]}
    total["no"] = 3000 - total["yes"]
    metrics = pope.scores(total)
    assert {name: metrics[name] for name in expected} == expected
    assert metrics["length"] == 3


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared with the benchmark's files")
@pytest.mark.parametrize("split", GOLDEN)
def test_same_numbers_as_the_official_script(split: str) -> None:
    labels = SHARED / f"benchmarks/pope/coco_pope_{split}.json"
    answers = SHARED / f"golden/pope_answers_{split}.jsonl"
    questions = pope.read_questions(labels)
    found, warnings = pope.read_answers(answers, questions, labels, "stop")
    outcome = pope.evaluate(questions, found, strict="official", seed=0, resamples=50)
    assert {name: outcome.metrics[name] for name in GOLDEN[split]} == GOLDEN[split]
    assert warnings == []
    fixed = pope.evaluate(questions, found, strict="fixed", seed=0, resamples=50).metrics
    assert fixed["accuracy"] > 0.8 > outcome.metrics["accuracy"]
    assert 0.45 < fixed["yes_ratio"] < 0.55 < outcome.metrics["yes_ratio"]


def test_by_hand(tmp_path: Path) -> None:
    metrics = run(tmp_path, said("Yes.", "NO", "No, none", "There is one")).metrics
    assert [metrics[name] for name in ("tp", "fp", "tn", "fn")] == [1, 2, 0, 1]
    assert metrics["accuracy"] == 0.25
    assert metrics["yes_ratio"] == metrics["yes_rate"] == 0.75
    assert metrics["coverage"] == metrics["recall"] == 0.5


def test_fixed_reads_what_was_said(tmp_path: Path) -> None:
    outcome = run(tmp_path, said("Yes.", "NO", "maybe", "maybe"), "fixed")
    metrics = outcome.metrics
    assert [metrics[name] for name in ("tp", "fp", "tn", "fn")] == [1, 0, 1, 1]
    assert metrics["accuracy"] == 0.5  # "maybe" is wrong, whatever the truth
    assert metrics["unclear"] == 2
    assert metrics["yes_rate"] == metrics["no_rate"] == 0.25
    assert outcome.warnings == ["3 of 4 answers read differently with strict official"]
    assert [case.badness > 0 for case in outcome.cases] == [False, False, True, True]


def test_rows_with_ids_may_come_in_any_order(tmp_path: Path) -> None:
    rows = [
        {"question_id": i, "text": a} for i, a in ((4, "no"), (1, "yes"), (3, "yes"), (2, "no"))
    ]
    assert run(tmp_path, rows).metrics["accuracy"] == 1


def test_missing_ids_may_be_left_out(tmp_path: Path) -> None:
    rows = [{"question_id": i, "text": "no"} for i in (2, 3)]
    assert run(tmp_path, rows, on_missing="skip").metrics["accuracy"] == 0.5
    with pytest.raises(InputError, match=r"no answer for 2 of 4 ids \(1, 4\)"):
        run(tmp_path, rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (said(*"abcd")[:3], "has 3 answers for the 4 questions of"),
        ([*said(*"abcd"), {"answer": "no"}], "has 5 answers for the 4 questions"),
        (
            [said(*"abcd")[0], *said(*"abcd")[:3]],
            "line 2: answers 'Is there a dog.*asks 'Is there a cat",
        ),
        ([{"question_id": 1, "answer": "a"}] * 2, "line 2: id 1 comes again"),
        ([{"question_id": 9, "answer": "a"}], "line 1: id 9 is not in"),
        (
            [*said(*"abc", "d")[:3], {"question": LABELS[3]["text"]}],
            "line 4: no 'answer' or 'text'",
        ),
        ([{"question_id": 1, "answer": "a"}, {"answer": "b"}], "line 2: no 'question_id'"),
    ],
)
def test_bad_answers(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(tmp_path, rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "maybe"}, "line 2: label 'maybe' is neither"),
        ({"question_id": 1}, "id 1 comes again"),
    ],
)
def test_bad_labels(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "labels.json", [LABELS[0], LABELS[1] | change])
    with pytest.raises(InputError, match=message):
        pope.read_questions(path)
