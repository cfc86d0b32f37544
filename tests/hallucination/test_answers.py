"""Yes or no: what the official scripts read, and what was said."""

from __future__ import annotations

import pytest

from mmalign.hallucination.answers import amber_official, pope_official, read_yes_no


@pytest.mark.parametrize(
    ("answer", "official", "fixed"),
    [
        ("Yes", "yes", "yes"),
        ("No", "no", "no"),
        ("no, there is not.", "no", "no"),
        ("There is no such thing", "no", "no"),
        ("There is one in the image.", "yes", "yes"),
        ("Yes. No dog is there", "yes", "yes"),
        # Where the official reading is wrong:
        ("NO", "yes", "no"),
        ("Not visible", "yes", "no"),
        ("I cannot see one", "yes", "no"),
        ("There isn't", "yes", "no"),
        ("There isn\u2019t", "yes", "no"),
        ("No\nYes", "yes", "no"),
        ("**No**", "yes", "no"),
        ("Yes, it is not far away", "no", "yes"),
        ("", "yes", None),
        ("A red bus", "yes", None),
        ("I'm not sure", "no", None),
        ("It is difficult to tell", "yes", None),
        ("I can't determine that", "yes", None),
    ],
)
def test_pope(answer: str, official: str, fixed: str | None) -> None:
    assert pope_official(answer) == official
    assert read_yes_no(answer) == fixed


@pytest.mark.parametrize(
    ("answer", "official", "fixed"),
    [
        ("Yes", "yes", "yes"),
        ("No", "no", "no"),
        ("No.", None, "no"),
        ("yes", None, "yes"),
        (" Yes", None, "yes"),
        ("Yes, there is.", None, "yes"),
        ("", None, None),
    ],
)
def test_amber(answer: str, official: str | None, fixed: str | None) -> None:
    assert amber_official(answer) == official
    assert read_yes_no(answer) == fixed
