"""Which objects are in which image: from COCO's annotations, or from a file of labels."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from mmalign.data.files import read_text
from mmalign.hallucination.records import Record, id_field, image_id, read_json, read_records
from mmalign.hallucination.vocabulary import Vocabulary
from mmalign.types import InputError

Objects = dict[str, frozenset[str]]
"""Image id -> objects of the vocabulary that are in the image."""


def read_labels(path: Path, vocabulary: Vocabulary) -> Objects:
    """Read a file of labels: `{image_id: [objects]}`, or rows with `image_id` and `objects`.

    Raises:
        InputError: naming file and image, for anything else, images that come twice, and objects
            that the vocabulary does not have.
    """
    found: Objects = {}
    for record in _label_rows(path):
        key = image_id(id_field(record, "image_id"))
        names = record.fields.get("objects")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"{record.where}: expected a list of object names")
        if key in found:
            raise InputError(f"{record.where}: image {key} comes again")
        found[key] = frozenset(_node(name, vocabulary, record.where) for name in names)
    return found


def read_coco(
    folder: Path, images: Collection[str], vocabulary: Vocabulary
) -> tuple[Objects, list[str]]:
    """Read what COCO's annotations say about some images: segmented objects, and those in captions.

    Args:
        folder: has `instances_*.json` and `captions_*.json`, any split or year.
        images: ids of the images.
        vocabulary: reads categories and captions.

    Returns:
        Objects of every image that is annotated, and warnings.

    Raises:
        InputError: if there are no instances, or a file is not as COCO's.
    """
    instances = sorted(folder.glob("instances_*.json"))
    captions = sorted(folder.glob("captions_*.json"))
    if not instances:
        raise InputError(f"{folder} has no instances_*.json: give COCO's annotations folder")
    wanted, found = set(images), dict[str, set[str]]()
    for path in instances:
        content = _coco_file(path, ("images", "categories", "annotations"))
        for key in _image_ids(content, wanted):
            found.setdefault(key, set())
        _add_segments(path, content, found, vocabulary)
    for path in captions:
        content = _coco_file(path, ("annotations",))
        for row in content["annotations"]:
            key = str(row.get("image_id"))
            if key in wanted:
                nodes = {m.node for m in vocabulary.mentions(str(row.get("caption")))}
                found.setdefault(key, set()).update(nodes)
    warnings = []
    if not captions:
        warnings.append(
            f"{folder} has no captions_*.json: objects that only people's captions name count as "
            "hallucinated, so numbers are higher than the official ones"
        )
    return {key: frozenset(nodes) for key, nodes in found.items()}, warnings


def _label_rows(path: Path) -> list[Record]:
    if _is_lines(path):
        return read_records(path)
    content = read_json(path, unique_keys=True)
    if isinstance(content, Mapping) and not {"image_id", "objects"} <= set(content):
        if not content:
            raise InputError(f"{path} is empty: expected {{image_id: [objects]}}")
        return [
            Record(f"{path} image {str(key)[:60]}", {"image_id": key, "objects": names})
            for key, names in content.items()
        ]
    return read_records(path)


def _is_lines(path: Path) -> bool:
    """Tell JSON lines, whose first line is an object by itself, from one JSON value."""
    first, _, rest = read_text(path).lstrip().partition("\n")
    if not rest.strip():
        return False
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _node(name: str, vocabulary: Vocabulary, where: str) -> str:
    node = vocabulary.node(name)
    if node is None:
        raise InputError(
            f"{where}: object {name[:60]!r} is not in the vocabulary; "
            "give --vocabulary FILE with a line for it"
        )
    return node


def _coco_file(path: Path, parts: Iterable[str]) -> dict[str, Any]:
    content = read_json(path)
    for part in parts:
        rows = content.get(part) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{path}: {part!r} is not a list of objects, as in COCO's files")
    return dict(content)


def _image_ids(content: Mapping[str, Any], wanted: Collection[str]) -> list[str]:
    return [key for row in content["images"] if (key := str(row.get("id"))) in wanted]


def _add_segments(
    path: Path, content: Mapping[str, Any], found: dict[str, set[str]], vocabulary: Vocabulary
) -> None:
    names = {row.get("id"): str(row.get("name")) for row in content["categories"]}
    nodes = {
        key: _node(re.sub(r"\s+", " ", name), vocabulary, f"{path} category {key}")
        for key, name in names.items()
    }
    for index, row in enumerate(content["annotations"], 1):
        key = str(row.get("image_id"))
        if key not in found:
            continue
        if row.get("category_id") not in nodes:
            raise InputError(f"{path} annotation {index}: unknown category_id")
        found[key].add(nodes[row["category_id"]])
