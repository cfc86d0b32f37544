"""Reading the questions that pairs are made of."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from mmalign.config import TopicOverwriteConfig, as_path
from mmalign.data.files import read_jsonl, read_text, resolve_inside
from mmalign.data.images import SUFFIXES, check_header, hash_image
from mmalign.data.schema import BadRow, RowError, content_hash
from mmalign.topics.items import Item
from mmalign.types import ImageRef, InputError

BAR_DELAY = 1.0
IMAGE_KEYS = ("image", "file_name", "image_path", "img_path")
PROMPT_KEYS = ("prompt", "question")
_PLACEHOLDER = re.compile(r"\s*<(?:image|video)>\s*")

logger = logging.getLogger(__name__)


def read_questions(config: TopicOverwriteConfig) -> tuple[list[Item], list[BadRow]]:
    """Read questions: a `.jsonl`, a LLaVA `.json`, or a folder of images.

    Lines and entries name an image relative to the folder of images. A question's id is its own
    `id`, or else a hash of image and prompt; the same question twice counts as a bad row.

    Returns:
        The questions, and the rows that were left out under `on_bad_row: skip`.

    Raises:
        InputError: naming file and row, for the first bad one under `stop`; or without a question.
    """
    source = as_path(config.questions)
    items: list[Item] = []
    bad: list[BadRow] = []
    seen: dict[str, str] = {}
    for where, record in tqdm(_records(source), desc="read questions", delay=BAR_DELAY):
        try:
            if isinstance(record, RowError):
                raise record
            items.append(_item(where, record, _root(config, source), config, seen))
        except RowError as error:
            bad.append(BadRow(where, str(error)))
            if config.on_bad_row == "stop":
                raise InputError(f"{bad[-1]}; on_bad_row: skip leaves such rows out") from error
            logger.warning("skipped %s", bad[-1])
        if len(items) == config.limit:
            break
    if not items:
        raise InputError(f"{source} has no questions that can be asked")
    return items, bad


def _root(config: TopicOverwriteConfig, source: Path) -> Path:
    if config.images is not None:
        return as_path(config.images)
    return source if source.is_dir() else source.parent


def _records(source: Path) -> Iterator[tuple[str, dict[str, Any] | RowError]]:
    if source.is_dir():
        names = sorted(item.name for item in source.iterdir() if item.suffix.lower() in SUFFIXES)
        yield from ((f"{source}/{name}", {"image": name}) for name in names)
    elif source.suffix == ".json":
        yield from _llava(source)
    elif source.suffix == ".jsonl":
        for number, record in read_jsonl(source):
            yield f"{source} line {number}", record
    else:
        raise InputError(f"questions: {source} is not a folder, a .jsonl or a LLaVA .json")


def _llava(source: Path) -> Iterator[tuple[str, dict[str, Any] | RowError]]:
    try:
        entries = json.loads(read_text(source))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} is not usable JSON: {str(error)[:80]}") from error
    if not isinstance(entries, list):
        raise InputError(f"{source} is not a list of conversations")
    for number, entry in enumerate(entries, start=1):
        yield f"{source} entry {number}", _first_turn(entry)


def _first_turn(entry: object) -> dict[str, Any] | RowError:
    if not isinstance(entry, dict):
        return RowError(f"the entry is a {type(entry).__name__}, not an object")
    turns = entry.get("conversations")
    if turns is None:
        return entry
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], dict):
        return RowError("conversations has no turns")
    return {"id": entry.get("id"), "image": entry.get("image"), "prompt": turns[0].get("value")}


def _item(
    where: str,
    record: dict[str, Any],
    root: Path,
    config: TopicOverwriteConfig,
    seen: dict[str, str],
) -> Item:
    name = next((record[key] for key in IMAGE_KEYS if record.get(key)), None)
    if name is None:
        raise RowError(f"names no image: give one of {', '.join(IMAGE_KEYS)}")
    path = resolve_inside(root, name)
    prompt = next((record[key] for key in PROMPT_KEYS if record.get(key)), config.prompt)
    if not isinstance(prompt, str):
        raise RowError(f"the prompt is a {type(prompt).__name__}, not a text")
    prompt = _PLACEHOLDER.sub("\n", prompt).strip()
    if not prompt or any("\ud800" <= character <= "\udfff" for character in prompt):
        raise RowError("the prompt is empty or not valid Unicode")
    ref = ImageRef(path, str(path))
    check_header(ref, config.max_pixels)
    image_hash = hash_image(ref).hex()
    content = content_hash(f"{image_hash}\n{prompt}".encode()).hex()
    own = record.get("id")
    item = Item(content if own in (None, "") else str(own), prompt, ref, image_hash, where)
    for label, key in ((f"id {item.id!r}", f"id {item.id}"), ("the same question", content)):
        earlier = seen.setdefault(key, where)
        if earlier != where:
            raise RowError(f"{label} is also at {earlier}")
    return item
