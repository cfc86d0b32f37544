"""`topics.html`: what each stage made of some of the questions, on one page without scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.data.files import write_bytes
from mmalign.data.images import decode
from mmalign.data.schema import RowError
from mmalign.report import PICTURE_PIXELS, render
from mmalign.topics.editing import SIDES
from mmalign.topics.grouping import topics_of
from mmalign.topics.items import Item, claims_of
from mmalign.topics.pairs import PAGE
from mmalign.topics.select import mean_score

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST_TOPICS = 12


def write_page(
    items: Sequence[Item], folder: Path, *, counts: Mapping[str, Any], shown: int, max_pixels: int
) -> Path:
    """Write the page; of many questions it shows evenly spaced ones, none chosen by hand.

    Raises:
        InputError: if it cannot be written.
    """
    step = max(1, len(items) / max(shown, 1))
    some = [items[int(i * step)] for i in range(min(shown, len(items)))]
    views = [view(item, max_pixels) for item in some]
    text = render("topics.html.j2", views=views, counts=counts, questions=len(items))
    write_bytes(folder / PAGE, text.encode())
    return folder / PAGE


def view(item: Item, max_pixels: int) -> dict[str, Any]:
    """Prepare what is known of a question for the template."""
    results = item.results
    scored = claims_of(item) if "score" in results else {}
    selected = results.get("select", {})
    answers = [
        {
            "number": number,
            "text": text,
            "score": mean_score(scored[number]) if number in scored else None,
            "role": _role(number, selected),
        }
        for number, text in enumerate(results.get("sample", {}).get("answers", []))
    ]
    return {
        "id": item.id,
        "where": item.where,
        "prompt": item.prompt,
        "picture": _picture(item, max_pixels),
        "dropped": item.dropped,
        "answers": answers,
        "facts": [] if scored else results.get("split", {}).get("facts", []),
        "topics": _topics(item, selected) if scored and "cluster" in results else [],
        "sides": [_side(item, side) for side in SIDES if "template" in selected],
    }


def _role(number: int, selected: Mapping[str, Any]) -> str:
    if "template" not in selected:
        return ""
    if number == selected["template"]:
        return "template"
    if number == selected["best"]:
        return "best"
    return "worst" if number == selected["worst"] else ""


def _topics(item: Item, selected: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the candidates of each topic with their scores, the largest topics first."""
    claims = claims_of(item)
    used = {
        (*edit["from"], edit["kind"], edit["new"]): side
        for side in SIDES
        for edit in selected.get(side, [])
    }
    topics = []
    for topic in sorted(topics_of(item), key=len, reverse=True)[:LARGEST_TOPICS]:
        rows = []
        for answer, fact in topic:
            claim = claims[answer][fact]
            candidates = [("raw", claim.text, claim.score)]
            candidates += [("resampled", text, score) for text, score in claim.resampled]
            for kind, text, score in candidates:
                use = used.get((answer, fact, kind, text))
                rows.append(
                    {"text": text, "score": score, "kind": kind, "answer": answer, "use": use}
                )
        question = item.results["verify"]["facts"][topic[0][0]][topic[0][1]]["wh"]
        topics.append({"question": question, "rows": rows})
    return topics


def _side(item: Item, side: str) -> dict[str, Any]:
    results = item.results
    rewritten = results.get("rewrite", {}).get(side, {})
    rescored = results.get("rescore", {}).get(side, {})
    return {
        "name": side,
        "edits": results["select"][side],
        "text": rewritten.get("text"),
        "how": rewritten.get("how"),
        "fault": rewritten.get("fault"),
        "score": rescored.get("score"),
        "facts": rescored.get("facts", []),
    }


def _picture(item: Item, max_pixels: int) -> Image | None:
    """Decode an image, no larger than it is shown; None if it cannot be read."""
    try:
        picture = decode(item.image, max_pixels)
    except RowError:
        return None
    picture.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
    return picture
