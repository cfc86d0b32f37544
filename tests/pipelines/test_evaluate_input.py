"""Benchmark files that are missing, damaged or of another benchmark: one line, and no results."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from benchmark_files import CAPTIONS, MMHAL, RUNS, lines, run, write

Edit = Callable[[Path], object]

BAD: list[tuple[str, str, Edit | None, str]] = [
    ("chair", "--labels labels.json", None, "responses: give --responses FILE, or --model DIR"),
    ("chair", "--responses captions.jsonl", None, "labels: give --labels FILE"),
    ("chair", "--responses no.jsonl", None, "responses: no such file or folder: no.jsonl"),
    ("chair", RUNS["chair"] + " --annotations .", None, "give --labels or --annotations, not both"),
    ("chair", "--responses captions.jsonl --annotations .", None, "has no instances_*.json"),
    (
        "chair",
        RUNS["chair"],
        lambda d: lines(d / "captions.jsonl", CAPTIONS[0], "{"),
        "captions.jsonl line 2 is not JSON",
    ),
    (
        "chair",
        RUNS["chair"],
        lambda d: lines(d / "captions.jsonl", CAPTIONS[0]),
        "captions.jsonl: no answer for 1 of 2 ids (2)",
    ),
    (
        "chair",
        RUNS["chair"],
        lambda d: lines(d / "captions.jsonl", *CAPTIONS, CAPTIONS[0]),
        "line 3: id 1 comes again",
    ),
    (
        "chair",
        RUNS["chair"],
        lambda d: lines(d / "captions.jsonl", {"caption": "x"}),
        "line 1: no 'image_id'",
    ),
    (
        "chair",
        RUNS["chair"],
        lambda d: lines(d / "labels.json", {"1": ["yeti"]}),
        "labels.json image 1: object 'yeti'",
    ),
    (
        "objhal",
        RUNS["objhal"],
        lambda d: lines(d / "objhal.jsonl", {"image_id": 7, "answer": "x"}),
        "no answer for 2 of 2",
    ),
    ("objhal", RUNS["objhal"] + " --judge.url http://x", None, "judge_by is not endpoint"),
    ("objhal", RUNS["objhal"] + " --judge_by endpoint", None, "url and model_name are required"),
    (
        "pope",
        "--responses pope.jsonl --annotations . --split easy",
        None,
        "split: unknown 'easy'; one of random",
    ),
    (
        "pope",
        "--responses pope.jsonl --annotations . --split popular",
        None,
        "must have one *pope*popular*.json, has none",
    ),
    ("pope", "--responses pope.jsonl --annotations .", None, "--split NAME"),
    (
        "pope",
        RUNS["pope"],
        lambda d: lines(d / "pope.jsonl", {"answer": "no"}),
        "has 1 answers for the 2 questions",
    ),
    (
        "pope",
        RUNS["pope"],
        lambda d: lines(d / "pope.jsonl", *[{"question_id": 1, "answer": ""}] * 2),
        "line 2: id 1 comes again",
    ),
    (
        "amber",
        RUNS["amber"],
        lambda d: lines(d / "amber.json", *[{"id": 1, "response": ""}] * 2),
        "line 2: id 1 comes again",
    ),
    (
        "amber",
        RUNS["amber"],
        lambda d: lines(d / "amber.json", {"id": 9, "response": ""}),
        "line 1: id 9 is not in",
    ),
    (
        "amber",
        RUNS["amber"] + " --evaluation_type a",
        lambda d: lines(d / "amber.json", {"id": 1, "response": ""}),
        "no answer for 2 of 3 ids (2, 3)",
    ),
    ("amber", RUNS["amber"], lambda d: (d / "amber/relation.json").unlink(), "relation.json"),
    ("amber", RUNS["amber"] + " --matching spacy", None, "spaCy is not installed"),
    ("amber", "--responses amber.json", None, "annotations: give --annotations DIR"),
    (
        "mmhal",
        RUNS["mmhal"],
        lambda d: lines(d / "mmhal.json", MMHAL[0], MMHAL[0]),
        "line 2: the question comes again",
    ),
    ("mmhal", RUNS["mmhal"] + " --judge_by reviews", None, "belong together"),
    ("mmhal", RUNS["mmhal"] + " --model m", None, "give --responses or --model, not both"),
    ("mmhal", RUNS["mmhal"] + " --resamples 0", None, "resamples: must be at least 1"),
]


@pytest.mark.parametrize(("name", "options", "edit", "message"), BAD)
def test_bad_input_is_one_line(
    files: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: str,
    edit: Edit | None,
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    if edit is not None:
        edit(files)
    run(name, options, code=2)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (files / "out/summary.json").exists()


def test_missing_answers_may_be_left_out(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines(files / "captions.jsonl", CAPTIONS[1])
    assert run("chair", RUNS["chair"] + " --on_missing skip")["metrics"]["chairs"] == 0
    assert "1 of 2 ids have no answer" in caplog.text
    assert "1 of 2 ids have no answer" in (files / "out/report.html").read_text()


def test_answers_that_say_nothing_are_pointed_out(
    files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = ["", "What a nice day."]
    write(
        files / "silent.jsonl", [{**r, "caption": s} for r, s in zip(CAPTIONS, said, strict=True)]
    )
    run("chair", "--responses silent.jsonl --labels labels.json")
    page = (files / "out/report.html").read_text()
    for warning in (
        "none of 2 answers names an object of the vocabulary: nothing is judged",
        "1 of 2 answers are empty",
    ):
        assert warning in caplog.messages
        assert warning in page
    caplog.clear()
    run("chair", RUNS["chair"])
    assert not caplog.messages
