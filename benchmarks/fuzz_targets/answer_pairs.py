"""Readers of preferences between answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .harness import parquet, png, target

TEXTS: dict[str, Any] = {"prompt": "What?", "chosen": "red", "rejected": "blue", "image": "a.png"}
TURNS: dict[str, Any] = {
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "r"}],
    "rejected": {"from": "gpt", "value": "blue"},
    "image": "a.png",
}
SWIFT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}],
    "rejected_response": "blue",
    "images": ["a.png"],
}
TRL: dict[str, Any] = {
    "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
    "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "red"}]}],
    "rejected": [{"role": "assistant", "content": "blue"}],
    "images": ["a.png"],
}
RLHF_V: dict[str, Any] = {"text": json.dumps(TEXTS), "image": "a.png"}


def _answers(path: Path) -> None:
    from mmalign.data.vlm_readers import scan_vlm
    from mmalign.data.vlm_source import open_vlm_source

    found = scan_vlm(open_vlm_source(str(path)), max_pixels=10_000, max_images=8, full=True)
    for pair in found.pairs:
        assert pair.chosen
        assert pair.rejected


@target(TEXTS, TURNS, SWIFT, TRL, RLHF_V, share=3)
def answer_pairs_jsonl(folder: Path, data: bytes) -> None:
    """Read preferences between answers as JSON lines."""
    (folder / "answers.jsonl").write_bytes(data)
    _answers(folder / "answers.jsonl")


@target([TEXTS], [TURNS], [SWIFT], share=3)
def answer_pairs_json(folder: Path, data: bytes) -> None:
    """The same as a JSON list."""
    (folder / "answers.json").write_bytes(data)
    _answers(folder / "answers.json")


@target(parquet(TEXTS), parquet({**RLHF_V, "image": {"bytes": png(), "path": None}}), share=3)
def answer_pairs_parquet(folder: Path, data: bytes) -> None:
    """The same as parquet."""
    (folder / "answers.parquet").write_bytes(data)
    _answers(folder / "answers.parquet")
