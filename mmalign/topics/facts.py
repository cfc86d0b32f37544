"""Reading what language models reply: lists of facts, and as many questions as there are facts."""

from __future__ import annotations

import re

_MARK = re.compile(r"^\s*(?:[-*\u2022\u2013]+|\(?\d{1,3}[.):])\s*")
_NUMBERED = re.compile(r"^\s*\(?(\d{1,3})[.):]\s*(.*\S)\s*$")


def first_words(text: str, limit: int) -> str:
    """Cut a text after `limit` words, its line breaks kept."""
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    return text if len(ends) <= limit else text[: ends[limit - 1]]


def read_list(reply: str, limit: int | None = None) -> list[str]:
    """Read the items of a list, one per line with or without a mark in front.

    Left out are empty lines, headings (`###`, or ending in a colon), code fences, and items that
    were there before, whatever their case.

    Args:
        reply: what a model wrote.
        limit: items to keep.
    """
    items: dict[str, str] = {}
    for line in reply.splitlines():
        text = _MARK.sub("", line).strip().strip('"').strip()
        if text and not text.startswith(("#", "```")) and not text.endswith(":"):
            items.setdefault(text.casefold(), text)
    return list(items.values())[:limit]


def read_numbered(reply: str, count: int) -> list[str] | None:
    """Read `count` lines numbered from 1 in order; None if there are more, fewer or others.

    A single line needs no number. Lines without a number are left out otherwise: models like to
    begin with a sentence of their own.
    """
    lines = [line for line in reply.splitlines() if line.strip()]
    found = [match for line in lines if (match := _NUMBERED.match(line))]
    if count == 1 and not found and len(lines) == 1:
        return [lines[0].strip()]
    if [int(match[1]) for match in found] != list(range(1, count + 1)):
        return None
    return [match[2] for match in found]


def numbered(items: list[str]) -> str:
    """Write items as numbered lines, each on one line."""
    return "\n".join(f"{n}. {' '.join(item.split())}" for n, item in enumerate(items, start=1))
