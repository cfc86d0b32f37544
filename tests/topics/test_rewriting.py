from __future__ import annotations

import pytest

from mmalign.topics import prompts
from mmalign.topics.rewriting import LABELS, hardness, rewrite_fault
from mmalign.topics.types import RewriteRequest
from mmalign.types import Question

ORIGINAL = "A black cat sits on a red mat."  # 30 characters


@pytest.mark.parametrize(
    ("rewritten", "fault"),
    [
        ("A white cat sits on a red mat.", None),
        ("Question: what? New answer: A white cat.", "echo"),
        ("A white cat.\nnew answer: A white cat.", "echo"),
        ("A white cat. (Tips): 1. white", "echo"),
        ("(Corrected text) A white cat.", "echo"),
        ("ab", "empty"),
        ("   a  ", "empty"),
        ("a" * 7, "short"),
        ("a" * 8, None),
        ("a" * 90, None),
        ("a" * 91, "long"),
        ("The question: is it black?", None),
    ],
)
def test_rules_of_the_filter(rewritten: str, fault: str | None) -> None:
    assert rewrite_fault(ORIGINAL, rewritten) == fault


def test_labels_that_the_original_has_are_no_echo() -> None:
    assert rewrite_fault("Answer: a black cat", "Answer: a white cat") is None


def test_labels_are_those_of_the_prompt() -> None:
    text = prompts.rewrite(RewriteRequest(Question("What?"), "A cat.", (("old", "new"),)))
    lines = [line.partition(":")[0] for line in text.split("\n\n")[1].splitlines()]
    assert [line for line in lines if line in LABELS] == list(LABELS)
    assert '1. not "old" but "new"' in text


def test_curriculum_begins_easy_and_ends_hard() -> None:
    names = [f"q{n}" for n in range(10)]
    places = hardness(names, warmup_share=0.6, seed=0)
    assert list(places.values()) == [0.0] * 6 + [0.25, 0.5, 0.75, 1.0]
    assert sorted(places) == sorted(names)
    assert list(places) != names
    assert hardness(names[::-1], warmup_share=0.6, seed=0) == places
    assert list(hardness(names[::-1], warmup_share=0.6, seed=0)) == list(places)
    assert list(hardness(names, warmup_share=0.6, seed=1)) != list(places)


@pytest.mark.parametrize(("share", "values"), [(1.0, [0.0, 0.0]), (0.0, [0.5, 1.0])])
def test_curriculum_without_one_of_its_parts(share: float, values: list[float]) -> None:
    assert list(hardness(["a", "b"], warmup_share=share, seed=0).values()) == values
