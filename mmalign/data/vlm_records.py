"""One row of preferences between answers, in any of the layouts that people have.

Each layout has its own columns; all become a `VlmRecord`. Placeholders of images are taken out of
the question, since a chat template puts them where its model wants them, but there must be as many
of them as images, or none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from mmalign.data.schema import CHOSEN, OPTIONAL_COLUMNS, REJECTED, RowError, require

Layout = Literal["vlm", "trl", "rlhf_v", "swift", "llava"]
REVISED = "revised"
IMAGE_KEYS = ("images", "image", "file_names", "file_name", "img_path", "image_path")
VIDEO_KEYS = ("videos", "video", "frames")
_PLACEHOLDER = re.compile(r"[ \t]*<(image|video)>[ \t]*\n?")
_USERS, _ASSISTANTS = ("user", "human"), ("assistant", "gpt")


class VlmRecord(NamedTuple):
    """A row in plain words: its texts, and cells that stand for images or for videos.

    `fields` has the columns of scores and ids, and `prompt`.
    """

    fields: Mapping[str, object]
    chosen: str
    rejected: str
    revised: str | None
    images: list[object]
    videos: list[object]


def layout_of(record: Mapping[str, Any], *, text_only: bool) -> Layout | None:
    """Recognise the layout of a row; None for one that is no pair of answers.

    Args:
        record: columns by name.
        text_only: whether plain texts without an image can be meant; in parquet files such columns
            are names of image files.
    """
    keys = set(record)
    if "messages" in keys:
        return "swift"
    if "conversations" in keys:
        return "llava"
    if isinstance(record.get("text"), str) and not keys & {CHOSEN, REJECTED}:
        return "rlhf_v"
    sides = [record.get(name) for name in (CHOSEN, REJECTED)]
    if any(isinstance(side, list) for side in sides):
        return "trl"
    has_image = bool(keys & {*IMAGE_KEYS, *VIDEO_KEYS, "question"})
    if any(isinstance(side, str) for side in sides) and (has_image or text_only):
        return "vlm"
    return None


def read_record(record: Mapping[str, Any], layout: Layout) -> VlmRecord:
    """Read a row of a known layout.

    Raises:
        RowError: a column is missing or of the wrong type, an answer is empty, both are the same,
            or there are not as many placeholders as images.
    """
    prompt, chosen, rejected, blocks = _LAYOUTS[layout](record)
    for name in ("rejected_images", "rejected_image"):
        if record.get(name):
            raise RowError(f"{name}: both answers must be about the same images")
    images, videos = _cells(record, IMAGE_KEYS), _cells(record, VIDEO_KEYS)
    question = _without_placeholders(prompt, len(images), len(videos), blocks)
    revised = _text(record, REVISED) if record.get(REVISED) is not None else None
    answers = {CHOSEN: chosen, REJECTED: rejected, REVISED: revised}
    for name, text in answers.items():
        if text is None:
            continue
        if not text.strip():
            raise RowError(f"{name} is empty")
        if _PLACEHOLDER.search(text):
            raise RowError(f"{name} has a placeholder of an image: answers are text")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise RowError(f"{name} is not valid Unicode (a lone surrogate)")
    if chosen.strip() == rejected.strip():
        raise RowError("chosen and rejected are the same text")
    fields = {name: record.get(name) for name in OPTIONAL_COLUMNS} | {"prompt": question}
    return VlmRecord(
        fields,
        chosen.strip(),
        rejected.strip(),
        None if revised is None else revised.strip(),
        images,
        videos,
    )


class _Texts(NamedTuple):
    """Question and answers as written; `blocks` counts images that the question names by type."""

    prompt: str
    chosen: str
    rejected: str
    blocks: int | None = None


def _flat(record: Mapping[str, Any]) -> _Texts:
    prompt = "question" if "prompt" not in record and "question" in record else "prompt"
    require(record, (prompt, CHOSEN, REJECTED))
    asked, chosen, rejected = (_text(record, name) for name in (prompt, CHOSEN, REJECTED))
    return _Texts(asked, chosen, rejected)


def _trl(record: Mapping[str, Any]) -> _Texts:
    require(record, ("prompt", CHOSEN, REJECTED))
    messages = record["prompt"]
    if isinstance(messages, str):
        prompt, blocks = messages, None
    else:
        prompt, blocks = _only(messages, _USERS, "prompt")
    chosen, rejected = (_only(record[name], _ASSISTANTS, name)[0] for name in (CHOSEN, REJECTED))
    return _Texts(prompt, chosen, rejected, blocks)


def _rlhf_v(record: Mapping[str, Any]) -> _Texts:
    try:
        inner = json.loads(_text(record, "text"))
    except (ValueError, RecursionError) as error:
        raise RowError(f"text is not JSON: {str(error)[:80]}") from error
    if not isinstance(inner, dict):
        raise RowError(f"text is a JSON {type(inner).__name__}, not an object")
    return _flat(inner)


def _swift(record: Mapping[str, Any]) -> _Texts:
    if "rejected_response" not in record and "rejected_messages" in record:
        rejected = _only(_list(record, "rejected_messages")[-1:], _ASSISTANTS, "rejected_messages")
        text = rejected[0]
    else:
        require(record, ("messages", "rejected_response"))
        text = _text(record, "rejected_response")
    messages = _list(record, "messages")
    prompt, blocks = _only(messages[:-1], _USERS, "messages")
    return _Texts(prompt, _only(messages[-1:], _ASSISTANTS, "messages")[0], text, blocks)


def _llava(record: Mapping[str, Any]) -> _Texts:
    turns = _list(record, "conversations")
    require(record, (REJECTED,))
    if CHOSEN in record:
        asked, chosen = turns, _said(record, CHOSEN)
    else:
        asked, chosen = turns[:-1], _only(turns[-1:], _ASSISTANTS, "conversations")[0]
    prompt, blocks = _only(asked, _USERS, "conversations")
    return _Texts(prompt, chosen, _said(record, REJECTED), blocks)


_LAYOUTS: dict[Layout, Callable[[Mapping[str, Any]], _Texts]] = {
    "vlm": _flat,
    "trl": _trl,
    "rlhf_v": _rlhf_v,
    "swift": _swift,
    "llava": _llava,
}


def _said(record: Mapping[str, Any], name: str) -> str:
    """Read an answer that is a text or one message."""
    value = record[name]
    if isinstance(value, dict):
        return _only([value], _ASSISTANTS, name)[0]
    return _text(record, name)


def _only(messages: object, roles: tuple[str, ...], name: str) -> tuple[str, int | None]:
    """Read the one message there must be: its text, and how many images it names by type."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise RowError(f"{name} is not a list of messages")
    if len(messages) != 1:
        raise RowError(
            f"{name} has {len(messages)} messages where one is wanted: one question, one answer"
        )
    role = messages[0].get("role", messages[0].get("from"))
    if role not in roles:
        raise RowError(f"{name} has a message of {role!r}, not of {roles[0]}")
    content = messages[0].get("content", messages[0].get("value"))
    if isinstance(content, str):
        return content, None
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise RowError(f"{name} has a message without text")
    texts = [part.get("text") for part in content if part.get("type") == "text"]
    if not all(isinstance(text, str) for text in texts):
        raise RowError(f"{name} has a message whose text is not a text")
    return "\n".join(map(str, texts)), sum(part.get("type") == "image" for part in content)


def _list(record: Mapping[str, Any], name: str) -> list[Any]:
    require(record, (name,))
    value = record[name]
    if not isinstance(value, list):
        raise RowError(f"{name} is a {type(value).__name__}, not a list")
    return value


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if value is None:
        raise RowError(f"{name} is empty")
    if not isinstance(value, str):
        raise RowError(f"{name} is a {type(value).__name__}, not a text")
    return value


def _cells(record: Mapping[str, Any], keys: tuple[str, ...]) -> list[object]:
    """Collect what stands for images in the first column that has any."""
    for key in keys:
        value = record.get(key)
        if value is not None and value != []:
            return list(value) if isinstance(value, list) else [value]
    return []


def _without_placeholders(prompt: str, images: int, videos: int, blocks: int | None) -> str:
    found = [match[1] for match in _PLACEHOLDER.finditer(prompt)]
    counts = (("image", images, found.count("image")), ("video", videos, found.count("video")))
    for name, there, named in counts:
        if named not in (0, there):
            raise RowError(f"the question has {named} <{name}> for {there} {name}s")
    if blocks is not None and blocks not in (0, images):
        raise RowError(f"the question has {blocks} blocks of type image for {images} images")
    return _PLACEHOLDER.sub(" ", prompt).strip()
