"""The pairs on disk: `pairs.jsonl` beside `images/`, and `counts.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign.data.files import write_bytes, write_jsonl
from mmalign.data.images import image_suffix, read_image_bytes
from mmalign.data.schema import BadRow
from mmalign.topics.editing import SIDES
from mmalign.topics.items import Item
from mmalign.topics.runner import losses
from mmalign.types import InputError

PAIRS, COUNTS, IMAGES, PAGE = "pairs.jsonl", "counts.json", "images", "topics.html"
ANY_SIZE = 2**62
MOST_REASONS = 3


def write_pairs(
    items: Sequence[Item], folder: Path, hardness: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Write the pairs, images first, so that `pairs.jsonl` never names one that is not there.

    A row has `image`, `prompt`, `chosen`, `rejected`, `pair_id`, mean scores S of both sides with
    their `margin` where known, `source` (`topics/rewritten`, `topics/fallback` or `topics/ranked`)
    and, with a curriculum, `hardness`; rows then are in its order, otherwise in that of the
    questions.

    Raises:
        InputError: if no pair is left, or files cannot be written.
    """
    alive = [item for item in items if item.dropped is None]
    if not alive:
        main = {name: _listed(reasons) for name, reasons in losses(items).items()}
        before = f"; left out on the way: {main['lost']}" if main["lost"] else ""
        raise InputError(
            f"no pairs: all {len(items)} questions were dropped ({main['dropped']}){before};"
            f" {folder / PAGE} shows what was answered"
        )
    if hardness:
        place = {name: number for number, name in enumerate(hardness)}
        alive.sort(key=lambda item: place[item.id])
    rows = []
    for item in alive:
        name = f"{IMAGES}/{item.image_hash}{image_suffix(item.image, ANY_SIZE)}"
        if not (folder / name).exists():
            write_bytes(folder / name, read_image_bytes(item.image))
        row = {"image": name, **_row(item)}
        rows.append(row | ({"hardness": hardness[item.id]} if hardness else {}))
    write_jsonl(folder / PAIRS, rows)
    return rows


def write_counts(
    items: Sequence[Item],
    bad_rows: Sequence[BadRow],
    rows: Sequence[Mapping[str, Any]],
    folder: Path,
) -> dict[str, Any]:
    """Write `counts.json`: what became of the questions, and what was dropped and why."""
    sources = [row["source"] for row in rows]
    counts = {
        "questions": len(items),
        "bad_rows": [str(row) for row in bad_rows],
        "pairs": len(rows),
        "sources": {source: sources.count(source) for source in sorted(set(sources))},
        "edits": {
            side: sum(len(i.results["select"][side]) for i in items if i.dropped is None)
            for side in SIDES
        },
        **losses(items),
    }
    text = json.dumps(counts, indent=2, ensure_ascii=False) + "\n"
    write_bytes(folder / COUNTS, text.encode())
    return counts


def _listed(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{n} x {reason}" for reason, n in list(reasons.items())[:MOST_REASONS])


def _row(item: Item) -> dict[str, Any]:
    sides, scores = item.results["rewrite"], item.results["rescore"]
    chosen, rejected = (scores[side]["score"] for side in SIDES)
    ways = {sides[side]["how"] for side in SIDES}
    way = next((name for name in ("ranked", "fallback") if name in ways), "rewritten")
    row: dict[str, Any] = {
        "prompt": item.prompt,
        **{side: sides[side]["text"] for side in SIDES},
        "pair_id": item.id,
        "source": f"topics/{way}",
    }
    known = {"score_chosen": chosen, "score_rejected": rejected}
    row |= {name: value for name, value in known.items() if value is not None}
    if chosen is not None and rejected is not None:
        row["margin"] = chosen - rejected
    return row
