"""A closed vocabulary: which words of a text name which objects.

The rules are CHAIR's (Rohrbach et al. 2018, arXiv 1809.02156, section 3): nouns in the singular,
pairs of words that mean one thing merged, words mapped to the classes they name. The official
scripts take singulars from the package `pattern` or from WordNet; here they come from rules that
know the vocabulary, so nothing is downloaded and rare plurals may be read differently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from mmalign.data.files import read_lines
from mmalign.hallucination.coco import COCO_WORDS, REPLACED
from mmalign.hallucination.nouns import Word, lemma, words
from mmalign.types import InputError


class Mention(NamedTuple):
    """A place in a text that names an object: `text[start:stop]`, the word it was read as."""

    word: str
    node: str
    start: int
    stop: int


class Vocabulary:
    """Words of objects.

    Attributes:
        nodes: names of the objects, in order.
    """

    def __init__(
        self,
        synonyms: Mapping[str, Sequence[str]],
        replaced: Mapping[str, str] | None = None,
    ) -> None:
        """Index the words.

        Args:
            synonyms: object name -> other words for it.
            replaced: pairs of words that are read as one word, which need not be an object's.

        Raises:
            InputError: a word stands for two objects.
        """
        self.nodes = tuple(synonyms)
        self._node_of: dict[str, str] = {}
        for node, names in synonyms.items():
            for name in (node, *names):
                if self._node_of.setdefault(name, node) != node:
                    raise InputError(
                        f"vocabulary: {name!r} stands for {self._node_of[name]!r} and for {node!r}"
                    )
        phrases = [name for name in self._node_of if " " in name]
        self._phrases = {phrase: phrase for phrase in phrases} | dict(replaced or {})
        self._longest = max((phrase.count(" ") + 1 for phrase in self._phrases), default=1)
        parts = [part for phrase in self._phrases for part in phrase.split()]
        self._known = {*self._node_of, *parts}

    def node(self, name: str) -> str | None:
        """Find the object that a word or phrase names; None for words that are not in here."""
        reduced = [lemma(word.text.lower(), self._known) for word in words(name)]
        exact = self._node_of.get(name.strip().lower())
        return exact or self._node_of.get(" ".join(reduced))

    def mentions(self, text: str) -> list[Mention]:
        """Find every mention of an object, repetitions included, in order."""
        merged = self._merged(text)
        seat_of_toilet = {"toilet", "seat"} <= {word.text for word in merged}
        return [
            Mention(word.text, self._node_of[word.text], word.start, word.stop)
            for word in merged
            if word.text in self._node_of and not (seat_of_toilet and word.text == "seat")
        ]

    def _merged(self, text: str) -> list[Word]:
        """Reduce words to singulars and join those that mean one thing, longest first."""
        singles = [
            Word(lemma(word.text.lower(), self._known), word.start, word.stop)
            for word in words(text)
        ]
        merged: list[Word] = []
        index = 0
        while index < len(singles):
            size = self._phrase_at(text, singles, index)
            part = singles[index : index + size]
            phrase = " ".join(word.text for word in part)
            merged.append(Word(self._phrases.get(phrase, phrase), part[0].start, part[-1].stop))
            index += size
        return merged

    def _phrase_at(self, text: str, singles: Sequence[Word], index: int) -> int:
        """Count the words of the longest phrase that begins here; 1 when there is none."""
        for size in range(min(self._longest, len(singles) - index), 1, -1):
            part = singles[index : index + size]
            gaps = (text[a.stop : b.start] for a, b in pairwise(part))
            if " ".join(word.text for word in part) in self._phrases and not any(
                gap.strip() for gap in gaps
            ):
                return size
        return 1


def coco_vocabulary() -> Vocabulary:
    """The 80 classes of COCO with this project's list of words."""
    return Vocabulary(COCO_WORDS, REPLACED)


def read_vocabulary(path: Path, *, strip: bool) -> Vocabulary:
    """Read a vocabulary in the format of CHAIR's `synonyms.txt`.

    One object per line: its name, then other words, separated by a comma and a space. CHAIR's rules
    for pairs of words apply to it.

    Args:
        path: text file.
        strip: take stray spaces off words. CHAIR's script keeps them, so that its file's
            " motor bike" never matches.

    Raises:
        InputError: naming file and line, for an unreadable file or a word of two objects.
    """
    synonyms: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for number, line in enumerate(read_lines(path), 1):
        names = line.strip().lower().split(", ")
        if strip:
            names = [name.strip(" ,") for name in names]
        if not names[0]:
            raise InputError(f"{path} line {number} is empty: each line names one object")
        for name in filter(None, names):
            if owner.setdefault(name, names[0]) != names[0]:
                raise InputError(
                    f"{path} line {number}: {name!r} already stands for {owner[name]!r}"
                )
        synonyms.setdefault(names[0], []).extend(filter(None, names[1:]))
    if not synonyms:
        raise InputError(f"{path} names no object")
    return Vocabulary(synonyms, REPLACED)
