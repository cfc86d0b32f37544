"""POPE: is there an X in the image? (Li et al. 2023, arXiv 2305.10355).

The positive class is "yes". Half of the questions of every split are about objects that are
there, so a model that always says yes has accuracy 0.5, recall 1 and yes rate 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mmalign.hallucination.answers import Strict, YesNo, pope_official, read_yes_no
from mmalign.hallucination.bootstrap import Counts, intervals, ratio, totals
from mmalign.hallucination.nouns import count_words
from mmalign.hallucination.outcome import Case, Outcome
from mmalign.hallucination.records import (
    OnMissing,
    Record,
    check_complete,
    check_known,
    id_field,
    image_id,
    read_records,
    text_field,
    without_doubles,
)
from mmalign.types import InputError

SPLITS = ("random", "popular", "adversarial")
HEADLINE = {"f1": "F1", "accuracy": "accuracy", "yes_ratio": "says yes"}


class Question(NamedTuple):
    """A question of a label file; `label` is the truth."""

    question_id: str
    image: str
    text: str
    label: YesNo


def read_questions(path: Path) -> list[Question]:
    """Read a label file: JSON lines with `question_id`, `image`, `text` and `label`.

    Raises:
        InputError: naming file and row, for rows that lack something or ids that come twice.
    """
    found = []
    records = read_records(path)
    without_doubles((id_field(record, "question_id"), record) for record in records)
    for record in records:
        label = text_field(record, "label").strip().lower()
        if label not in ("yes", "no"):
            raise InputError(f"{record.where}: label {label[:40]!r} is neither 'yes' nor 'no'")
        found.append(
            Question(
                id_field(record, "question_id"),
                text_field(record, "image"),
                text_field(record, "text"),
                "yes" if label == "yes" else "no",
            )
        )
    return found


def read_answers(
    path: Path, questions: Sequence[Question], labels: Path, on_missing: OnMissing
) -> tuple[dict[str, Record], list[str]]:
    """Read answers and find the question of each.

    Rows with `question_id` belong to that question. Rows without, as POPE's own script takes them,
    belong to the questions in order; where they repeat the question, it must be the same.

    Returns:
        Rows by question id, and warnings.

    Raises:
        InputError: naming file and row, for ids that are missing, doubled or unknown, rows in
            another order, and another number of rows than there are questions.
    """
    records = read_records(path)
    with_ids = ["question_id" in record.fields for record in records]
    if any(with_ids):
        found = without_doubles((id_field(record, "question_id"), record) for record in records)
        wanted = [question.question_id for question in questions]
        check_known(found, wanted, str(labels))
        return found, check_complete(path, found, wanted, on_missing)
    for record, question in zip(records, questions, strict=False):
        asked = record.fields.get("question", question.text)
        if not isinstance(asked, str) or _plain(question.text) not in _plain(asked):
            raise InputError(
                f"{record.where}: answers {str(asked)[:80]!r} where {labels} asks "
                f"{question.text!r}: a row is missing, doubled or out of order before it; "
                "rows with question_id may come in any order"
            )
    if len(records) != len(questions):
        raise InputError(
            f"{path} has {len(records)} answers for the {len(questions)} questions of {labels}"
        )
    rows = zip(questions, records, strict=True)
    return {question.question_id: record for question, record in rows}, []


def evaluate(
    questions: Sequence[Question],
    answers: dict[str, Record],
    *,
    strict: Strict,
    seed: int,
    resamples: int,
) -> Outcome:
    """Score answers by question id; questions without one are left out."""
    cases = [
        _case(question, text_field(answers[question.question_id], "answer", "text"), strict)
        for question in questions
        if question.question_id in answers
    ]
    other = sum(case.counts["read_differently"] for case in cases)
    warnings = []
    if other:
        second = "fixed" if strict == "official" else "official"
        warnings.append(
            f"{other:.0f} of {len(cases)} answers read differently with strict {second}"
        )
    return Outcome(
        benchmark="pope",
        metrics=scores(totals(cases)),
        ci95=intervals(cases, scores, seed=seed, resamples=resamples),
        cases=cases,
        headline=HEADLINE,
        warnings=warnings,
    )


def scores(total: Counts) -> dict[str, float]:
    """Compute POPE's metrics, unrounded as its script prints them.

    `coverage` is the recall: the share of the objects that are there that the model says are.
    In `fixed`, an answer that says neither is wrong, but is neither a yes nor a no: it lowers
    accuracy, and recall where the truth is yes.
    """
    tp, fp, tn, fn = (total.get(name, 0.0) for name in ("tp", "fp", "tn", "fn"))
    asked = total["answers"]
    precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
    return {
        "accuracy": ratio(tp + tn, asked),
        "precision": precision,
        "recall": recall,
        "f1": ratio(2 * precision * recall, precision + recall),
        "yes_ratio": ratio(total["yes"], asked),
        **{"tp": tp, "fp": fp, "tn": tn, "fn": fn},
        "unclear": total.get("unclear", 0.0),
        "length": ratio(total["words"], asked),
        "yes_rate": ratio(total["yes"], asked),
        "no_rate": ratio(total["no"], asked),
        "coverage": recall,
    }


def _case(question: Question, answer: str, strict: Strict) -> Case:
    official, fixed = pope_official(answer), read_yes_no(answer)
    said = official if strict == "official" else fixed
    right = said == question.label
    outcome = ("tp" if right else "fn") if question.label == "yes" else ("tn" if right else "fp")
    counts: dict[str, float] = {
        "answers": 1,
        "words": count_words(answer),
        "yes": said == "yes",
        "no": said == "no",
        "unclear": said is None,
        "read_differently": official != fixed,
    }
    if said is not None or question.label == "yes":
        counts[outcome] = 1
    invented = said == "yes" and question.label == "no"
    return Case(
        item=question.question_id,
        question=question.text,
        answer=answer,
        truth=question.label,
        verdict=f"read as {said or 'neither'}, " + ("right" if right else "wrong"),
        badness=0 if right else 2 if invented else 1,
        counts=counts,
        cluster=image_id(question.image),
        image=question.image,
    )


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
