"""Words of an English text, and the singular of nouns, without a dictionary to download."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from typing import NamedTuple

_WORD = re.compile(r"[^\W_]+(?:[-'\u2019][^\W_]+)*")
_POSSESSIVE = re.compile(r"['\u2019]s$", re.IGNORECASE)
IRREGULAR = {
    **{"children": "child", "oxen": "ox", "feet": "foot", "teeth": "tooth", "geese": "goose"},
    **{"mice": "mouse", "dice": "die", "lice": "louse", "cacti": "cactus", "fungi": "fungus"},
    **{"knives": "knife", "wives": "wife", "lives": "life", "leaves": "leaf", "loaves": "loaf"},
    **{"shelves": "shelf", "bookshelves": "bookshelf", "wolves": "wolf", "calves": "calf"},
    **{"halves": "half", "scarves": "scarf", "hooves": "hoof", "thieves": "thief"},
    **{"elves": "elf", "selves": "self", "sheaves": "sheaf", "busses": "bus", "quizzes": "quiz"},
}
SAME = frozenset(
    ("sheep", "fish", "deer", "bison", "aircraft", "watercraft", "series", "species", "cattle")
)
"""Nouns whose plural is their singular, or that have none."""


class Word(NamedTuple):
    """A word with its place in the text: `text[start:stop]` without a possessive ending."""

    text: str
    start: int
    stop: int


def words(text: str) -> Iterator[Word]:
    """Cut a text into words; hyphens and apostrophes inside a word belong to it."""
    for match in _WORD.finditer(text):
        found = _POSSESSIVE.sub("", match[0])
        yield Word(found, match.start(), match.start() + len(found))


def count_words(text: str) -> int:
    """Count what white space separates, as the official scripts measure length."""
    return len(text.split())


def singular_forms(word: str) -> tuple[str, ...]:
    """List what a lower-case noun could be the plural of, likeliest first; itself comes last."""
    if word in SAME:
        return (word,)
    if word in IRREGULAR:
        return (IRREGULAR[word], word)
    forms: list[str] = []
    if (word.endswith("men") and len(word) > 4) or word == "men":
        forms.append(word[:-3] + "man")
    elif word.endswith("ies") and len(word) > 4:
        forms += [word[:-3] + "y", word[:-1]]
    elif word.endswith(("sses", "shes", "ches", "xes", "zes")) or word.endswith(("oes", "uses")):
        forms += [word[:-2], word[:-1]]
    elif word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 2:
        forms.append(word[:-1])
    return (*forms, word)


def lemma(word: str, known: Container[str]) -> str:
    """Reduce a lower-case noun to the form a vocabulary has it in.

    A word that is known stays as it is; otherwise the first of `singular_forms` that is known, else
    the first of them.
    """
    if word in known:
        return word
    forms = singular_forms(word)
    return next((form for form in forms if form in known), forms[0])
