"""Yes or no: how the official scripts read an answer, and how it should be read."""

from __future__ import annotations

import re
from typing import Literal

from mmalign.hallucination.nouns import words

YesNo = Literal["yes", "no"]
Strict = Literal["official", "fixed"]

_NEGATIONS = frozenset(
    ("no", "not", "none", "nothing", "nobody", "neither", "never", "without", "cannot", "absent")
)
_SENTENCE_END = re.compile(r"[.!?\n]+(?:\s|$)")
_UNDECIDED = re.compile(
    r"\b(?:not (?:sure|certain|clear|possible)|unclear|unsure|uncertain|difficult to (?:say|tell)"
    r"|(?:cannot|can['\u2019]t|can not|could not|couldn['\u2019]t|unable to)"
    r" (?:be )?(?:determine|tell|say|confirm|answer)d?|don['\u2019]t know|do not know)\b"
)
_AFFIRMATIONS = re.compile(
    r"\b(?:there (?:is|are|appears? to be|seems? to be)|(?:i|you|we) (?:can )?see"
    r"|it (?:is|does|has)|they (?:are|do|have)|(?:is|are) (?:present|visible)|correct|true|indeed"
    r"|sure|certainly)\b"
)


def pope_official(text: str) -> YesNo:
    """Read an answer as POPE's `evaluate.py` does.

    "no" if the text before the first full stop, without commas and cut at spaces, has the word
    "No", "no" or "not"; everything else is "yes": "NO", "I cannot see one" and "isn't" as well.
    """
    first = text.partition(".")[0].replace(",", "")
    return "no" if {"No", "no", "not"} & set(first.split(" ")) else "yes"


def amber_official(text: str) -> YesNo | None:
    """Read an answer as AMBER's `inference.py` does: exactly "Yes" or "No", else neither."""
    return {"Yes": "yes", "No": "no"}.get(text)  # type: ignore[return-value]


def read_yes_no(text: str) -> YesNo | None:
    """Read an answer as a person would.

    A leading yes or no decides, whatever its case and punctuation ("NO", "No.", "**Yes**"). Else
    the first sentence does: doubt is neither, a negation ("cannot see", "isn't") is no, an
    affirmation ("there is", "I can see") is yes.

    Returns:
        None for what says neither: nothing, doubt, or another subject.
    """
    plain = text.strip().lower().replace("\u2019", "'")
    tokens = [word.text for word in words(plain)]
    if not tokens:
        return None
    if tokens[0] in ("yes", "no", "yeah", "yep", "nope"):
        return "no" if tokens[0] in ("no", "nope") else "yes"
    sentence = _SENTENCE_END.split(plain.lstrip(".!? "), maxsplit=1)[0]
    said = [word.text for word in words(sentence)]
    if _UNDECIDED.search(sentence):
        return None
    if any(word in _NEGATIONS or word.endswith("n't") for word in said):
        return "no"
    if "yes" in said or _AFFIRMATIONS.search(sentence):
        return "yes"
    return None
