"""Captions of images, in every format that CHAIR's and Object HalBench's scripts take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mmalign.data.files import read_text
from mmalign.hallucination.records import (
    Record,
    clean,
    id_field,
    image_id,
    read_json,
    read_records,
    text_field,
    without_doubles,
)
from mmalign.types import InputError


class Caption(NamedTuple):
    """What a model said of an image; `question` is empty where the file does not say."""

    image: str
    question: str
    text: str
    where: str


def read_captions(
    path: Path,
    *,
    image_keys: Sequence[str] = ("image_id",),
    text_keys: Sequence[str] = ("caption",),
    question_keys: Sequence[str] = (),
) -> list[Caption]:
    """Read captions: a JSON list or JSON lines of objects, or `imgToEval` of coco-caption's output.

    Args:
        path: file of captions.
        image_keys: names that the id of the image may have.
        text_keys: names that the caption may have.
        question_keys: names that the question may have; it may be missing.

    Raises:
        InputError: naming file and row, for rows that lack something and images that come twice.
    """
    records = _records(path)
    keyed = [(image_id(id_field(record, *image_keys)), record) for record in records]
    without_doubles(keyed)
    found = []
    for key, record in keyed:
        asked = next((record.fields[k] for k in question_keys if k in record.fields), "")
        found.append(
            Caption(key, clean(str(asked)), text_field(record, *text_keys).strip(), record.where)
        )
    return found


def _records(path: Path) -> list[Record]:
    if '"imgToEval"' not in read_text(path)[: 2**20]:
        return read_records(path)
    content = read_json(path, unique_keys=True)
    images = content.get("imgToEval") if isinstance(content, Mapping) else None
    if not isinstance(images, Mapping) or not images:
        raise InputError(f"{path}: 'imgToEval' is not an object of captions")
    found = []
    for key, row in images.items():
        where = f"{path} imgToEval {str(key)[:60]}"
        if not isinstance(row, Mapping):
            raise InputError(f"{where} is not an object")
        found.append(Record(where, {"image_id": key, **row}))
    return found
