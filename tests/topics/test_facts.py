from __future__ import annotations

import pytest

from mmalign.topics.facts import first_words, numbered, read_list, read_numbered


def test_lists_of_facts_however_they_are_marked() -> None:
    reply = """Here are the statements:
    - A cat sits on a mat.
    * The mat is red.
    3. It is "raining".
    (4) The cat is black.
    ### Statements

    - a cat sits on a MAT.
    \u2022 12 birds fly.
    ```"""
    assert read_list(reply) == [
        "A cat sits on a mat.",
        "The mat is red.",
        'It is "raining".',
        "The cat is black.",
        "12 birds fly.",
    ]
    assert read_list(reply, limit=2) == ["A cat sits on a mat.", "The mat is red."]


def test_a_reply_without_items_is_no_fact() -> None:
    assert read_list(" \n###\n\n") == []


@pytest.mark.parametrize(
    ("reply", "count", "lines"),
    [
        ("1. What is it?\n2) Where?", 2, ["What is it?", "Where?"]),
        ("Sure:\n1. What is it?\n\n2. Where?\nDone.", 2, ["What is it?", "Where?"]),
        ("What is it?", 1, ["What is it?"]),
        ("1: What is it?", 1, ["What is it?"]),
        ("1. a\n2. b\n3. c", 2, None),
        ("1. a", 2, None),
        ("2. a\n1. b", 2, None),
        ("a\nb", 2, None),
        ("", 1, None),
        ("1. a\n2. \n3. c", 3, None),
    ],
)
def test_numbered_lines_must_be_as_many_as_wanted(
    reply: str, count: int, lines: list[str] | None
) -> None:
    assert read_numbered(reply, count) == lines


def test_numbering_is_read_back() -> None:
    items = ["one", "two\nlines", "3. three"]
    assert read_numbered(numbered(items), 3) == ["one", "two lines", "3. three"]


def test_long_answers_are_cut_between_words() -> None:
    assert first_words("a b\n\nc  d", 3) == "a b\n\nc"
    assert first_words(" a b ", 2) == " a b "
