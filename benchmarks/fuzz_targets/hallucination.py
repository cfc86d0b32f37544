"""Readers of the hallucination benchmarks: questions, labels, answers and judgements."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from .harness import target

ANSWER: dict[str, Any] = {"question": "Is there a cat?", "answer": "no", "image_id": 3}


@target({"image": "x.jpg", "question_id": 1, "text": "Is there a cat?", "label": "yes"})
def pope_labels(folder: Path, data: bytes) -> None:
    """Read POPE's labels."""
    from mmalign.hallucination.pope import read_questions

    (folder / "pope.json").write_bytes(data)
    read_questions(folder / "pope.json")


@target({**ANSWER, "question_id": 1})
def pope_answers(folder: Path, data: bytes) -> None:
    """Read answers to POPE and score them."""
    from mmalign.hallucination import pope

    labels = {"image": "x.jpg", "question_id": 1, "text": "Is there a cat?", "label": "yes"}
    (folder / "labels.json").write_text(json.dumps(labels))
    (folder / "said.jsonl").write_bytes(data)
    questions = pope.read_questions(folder / "labels.json")
    pope.read_answers(folder / "said.jsonl", questions, folder / "labels.json", "skip")


@target({"image_id": 3, "caption": "A cat on a mat."}, [{"image_id": 3, "caption": "Dogs."}])
def chair_captions(folder: Path, data: bytes) -> None:
    """Read captions."""
    from mmalign.hallucination.captions import read_captions

    (folder / "captions.json").write_bytes(data)
    read_captions(folder / "captions.json")


@target({"image_id": 3, "objects": ["cat"]})
def chair_labels(folder: Path, data: bytes) -> None:
    """Read labels of objects."""
    from mmalign.hallucination.objects import read_labels
    from mmalign.hallucination.vocabulary import coco_vocabulary

    (folder / "labels.jsonl").write_bytes(data)
    read_labels(folder / "labels.jsonl", coco_vocabulary())


@target(
    {
        "question": "What?",
        "gt_answer": "A cat.",
        "model_answer": "A cat.",
        "image_id": "a",
        "question_type": "attribute",
        "question_topic": "animal",
        "image_content": ["cat"],
    }
)
def mmhal_answers(folder: Path, data: bytes) -> None:
    """Read answers to MMHal-Bench."""
    from mmalign.hallucination.mmhal import read_items

    (folder / "mmhal.json").write_bytes(data)
    read_items(folder / "mmhal.json", None)


@target({"id": 1, "truth": ["cat"], "hallu": ["kitten"], "type": "generative"})
def amber_annotations(folder: Path, data: bytes) -> None:
    """Read AMBER's annotations."""
    from mmalign.hallucination.amber import read_amber

    place = folder / "amber"
    place.mkdir(exist_ok=True)
    (place / "relation.json").write_text('{"cat": ["kitten"], "kitten": ["cat"]}')
    (place / "safe_words.txt").write_text("photo\n")
    (place / "annotations.json").write_bytes(data)
    read_amber(place)


@target(b'["cat", "dog"]', b"Rating: 3", b"1. a\n2. b\n")
def judge_replies(folder: Path, data: bytes) -> None:
    """Read what a language model replied to a judge's question."""
    from mmalign.hallucination.answers import pope_official, read_yes_no
    from mmalign.hallucination.mmhal import parse_fixed, parse_rating
    from mmalign.hallucination.objhal import parse_objects
    from mmalign.topics.facts import read_list, read_numbered

    text = data.decode("utf-8", "replace")
    pope_official(text)
    read_yes_no(text)
    parse_fixed(text)
    read_list(text, 5)
    read_numbered(text, 2)
    for parse in (parse_objects, lambda reply: parse_rating(reply, "fixed")):
        with suppress(ValueError):  # what the caller turns into a question that is asked again
            parse(text)
