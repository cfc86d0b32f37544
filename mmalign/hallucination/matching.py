"""Nouns that mean the same, by spaCy's word vectors where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache

from mmalign.types import InputError

SPACY_MODEL = "en_core_web_lg"


def spacy_similar(threshold: float) -> Callable[[str, str], bool]:
    """Compare nouns as AMBER's script does: by similarity in `en_core_web_lg`, over a threshold.

    Raises:
        InputError: if spaCy or its model is not installed.
    """
    try:
        import spacy
    except ImportError as error:
        raise InputError(
            "--matching spacy: spaCy is not installed; --matching exact needs nothing"
        ) from error
    try:
        read = spacy.load(SPACY_MODEL)
    except OSError as error:
        raise InputError(
            f"--matching spacy: the model {SPACY_MODEL} is not installed "
            f"(python -m spacy download {SPACY_MODEL}); --matching exact needs nothing"
        ) from error
    parsed = lru_cache(maxsize=None)(read)

    @cache
    def similar(first: str, second: str) -> bool:
        return bool(parsed(first).similarity(parsed(second)) > threshold)

    return similar
