"""Words of objects: every class, its plurals, and CHAIR's rules for pairs of words."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmalign.hallucination.coco import COCO_WORDS
from mmalign.hallucination.nouns import lemma, singular_forms, words
from mmalign.hallucination.vocabulary import Vocabulary, coco_vocabulary, read_vocabulary
from mmalign.types import InputError

COCO = coco_vocabulary()
PLURALS = {
    "person": "people", "bus": "buses", "sheep": "sheep", "knife": "knives", "mouse": "mice",
    "couch": "couches", "bench": "benches", "wine glass": "wine glasses", "skis": "skis",
    "scissors": "scissors", "toothbrush": "toothbrushes", "sandwich": "sandwiches", "tv": "TVs",
    "teddy bear": "teddy bears", "broccoli": "broccoli", "hot dog": "hot dogs",
    "donut": "donuts", "stop sign": "stop signs",
}  # fmt: skip


def nodes(text: str) -> list[str]:
    return [mention.node for mention in COCO.mentions(text)]


def test_has_the_80_classes_of_coco() -> None:
    assert len(COCO.nodes) == 80
    assert len({*COCO.nodes}) == 80
    assert {"person", "dining table", "tv", "hair drier", "skis"} <= {*COCO.nodes}


@pytest.mark.parametrize("name", COCO_WORDS)
def test_every_word_and_its_plural_names_its_class(name: str) -> None:
    for word in (name, *COCO_WORDS[name]):
        if word in ("bow tie", "toilet seat"):  # read as another word of the same class
            continue
        assert nodes(f"There is a {word}.") == [name], word
    plural = PLURALS.get(name, name if name.endswith("s") else f"{name}s")
    assert nodes(f"Some {plural}, here") == [name]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two men's bikes", ["person", "bicycle"]),
        ("two firemen and three policewomen", ["person", "person"]),
        ("a baby elephant beside an adult zebra", ["elephant", "zebra"]),
        ("a passenger train on train tracks", ["train"]),
        ("the catcher behind home plate", ["person"]),
        ("he wears a bow tie", ["tie"]),
        ("the seat of the toilet", ["toilet"]),
        ("a toilet seat", ["toilet"]),
        ("a man in the driver seat", ["person", "person", "chair"]),
        ("children with hot dogs", ["person", "hot dog"]),
        ("a dog, hot", ["dog"]),
        ("hot, dog", ["dog"]),
        ("GEESE and Geese", ["bird", "bird"]),
        ("glasses on a glass table", ["dining table"]),
        ("a couple of birds", ["bird"]),
        ("bread, grass and a dress", []),
        ("", []),
    ],
)
def test_mentions(text: str, expected: list[str]) -> None:
    assert nodes(text) == expected


def test_mentions_know_their_place() -> None:
    text = "Cats' eyes: two wine  glasses."
    assert [text[m.start : m.stop] for m in COCO.mentions(text)] == ["Cats", "wine  glasses"]


@pytest.mark.parametrize(
    ("plural", "singular"),
    [
        ("ladies", "lady"), ("boxes", "box"), ("dishes", "dish"), ("tomatoes", "tomato"),
        ("leaves", "leaf"), ("women", "woman"), ("children", "child"), ("dresses", "dress"),
        ("grass", "grass"), ("bus", "bus"), ("tennis", "tennis"), ("deer", "deer"), ("gas", "ga"),
    ],
)  # fmt: skip
def test_singular_without_a_vocabulary(plural: str, singular: str) -> None:
    assert singular_forms(plural)[0] == singular


def test_vocabulary_decides_between_singulars() -> None:
    assert lemma("movies", ()) == "movy"
    assert lemma("movies", {"movie"}) == "movie"
    assert lemma("shoes", {"shoe"}) == "shoe"
    assert lemma("glasses", {"glasses", "glass"}) == "glasses"


def test_words_keep_hyphens_and_drop_possessives() -> None:
    found = [word.text for word in words("A man\u2019s T-shirt isn't 2nd-hand_x")]
    assert found == ["A", "man", "T-shirt", "isn't", "2nd-hand", "x"]


def test_a_word_of_two_objects_is_refused() -> None:
    with pytest.raises(InputError, match="'ball' stands for 'sphere' and for 'dance'"):
        Vocabulary({"sphere": ["ball"], "dance": ["ball"]})


def test_reads_synonyms_as_the_official_script_does(tmp_path: Path) -> None:
    path = tmp_path / "synonyms.txt"
    path.write_text("motorcycle,  motor bike, moped\ncake, pancake \nzebra\n")
    strict, fixed = (read_vocabulary(path, strip=strip) for strip in (False, True))
    assert [m.node for m in strict.mentions("motor bikes and mopeds")] == ["motorcycle"]
    assert [m.node for m in fixed.mentions("motor bikes and mopeds")] == ["motorcycle"] * 2
    assert strict.node("pancakes") == "cake"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dog, pup\ncat, pup\n", "line 2: 'pup' already stands for 'dog'"),
        ("dog\n\ncat\n", "line 2 is empty"),
        ("", "names no object"),
    ],
)
def test_bad_vocabulary(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "words.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_vocabulary(path, strip=True)
