"""spaCy is optional: one line when it is missing, and its similarity when it is there."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from mmalign.hallucination.matching import spacy_similar
from mmalign.types import InputError


class Doc:
    def __init__(self, text: str) -> None:
        self.text = text

    def similarity(self, other: Doc) -> float:
        return len({*self.text} & {*other.text}) / len({*self.text} | {*other.text})


def test_uses_spacy(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(name: str) -> Any:
        loaded.append(name)
        return Doc

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))
    similar = spacy_similar(0.5)
    assert similar("boat", "boats")
    assert not similar("boat", "sky")
    assert not similar("ab", "bc")
    assert loaded == ["en_core_web_lg"]


def test_without_spacy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(InputError, match="spaCy is not installed"):
        spacy_similar(0.8)


def test_without_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        raise OSError(f"Can't find model {name!r}")

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))
    with pytest.raises(InputError, match="en_core_web_lg is not installed"):
        spacy_similar(0.8)
