"""Answers to every hallucination benchmark with what they are judged by, in the official files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmalign import cli

HOSTILE = "<script>alert('x')</script> & \"a\" car\u202e"
LABELS = {"1": ["dog", "person"], "2": ["cat"]}
CAPTIONS = [
    {"image_id": 1, "caption": f"A dog near a man. {HOSTILE}"},
    {"image_id": 2, "caption": "Two cats."},
]
POPE = [
    {
        "question_id": 1,
        "image": "COCO_val2014_000000000001.jpg",
        "text": "Is there a dog in the image?",
        "label": "yes",
    },
    {
        "question_id": 2,
        "image": "COCO_val2014_000000000002.jpg",
        "text": "Is there a car in the image?",
        "label": "no",
    },
]
MMHAL = [
    {"image_content": ["Dog"], "image_src": "https://host/1.jpg", "question": f"{i}: what is it?",
     "gt_answer": "A dog.", "model_answer": said}
    for i, said in enumerate(["A dog.", "A dog and a bus."])
]  # fmt: skip


def write(path: Path, content: Any) -> str:
    lines = path.suffix == ".jsonl"
    text = "\n".join(map(json.dumps, content)) if lines else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return str(path)


def save_files(folder: Path) -> Path:
    """Write answers and labels of every benchmark."""
    write(folder / "captions.jsonl", CAPTIONS)
    write(folder / "labels.json", LABELS)
    write(folder / "objhal.jsonl", [
        {"image_id": row["image_id"], "question": "Describe it", "answer": row["caption"]}
        for row in CAPTIONS
    ])  # fmt: skip
    write(folder / "pope.jsonl", [{"answer": "Yes"}, {"answer": "NO"}])
    write(folder / "coco_pope_random.json", POPE)
    (folder / "coco_pope_random.json").write_text("\n".join(map(json.dumps, POPE)))
    write(folder / "mmhal.json", MMHAL)
    amber = folder / "amber"
    amber.mkdir()
    write(amber / "annotations.json", [
        {"id": 1, "type": "generative", "truth": ["dog"], "hallu": ["car"]},
        {"id": 2, "type": "discriminative-hallucination", "truth": "no"},
        {"id": 3, "type": "discriminative-attribute-state", "truth": "yes"},
    ])  # fmt: skip
    write(amber / "relation.json", {"dog": ["hound"], "car": []})
    (amber / "safe_words.txt").write_text("orange")
    write(amber / "query_all.json", [
        {"id": i, "image": f"AMBER_{i}.jpg", "query": f"Query {i}?"} for i in (1, 2, 3)
    ])  # fmt: skip
    said = enumerate(["a dog, a car", "No.", "Yes"], 1)
    write(folder / "amber.json", [{"id": i, "response": text} for i, text in said])
    return folder


RUNS = {
    "chair": "--responses captions.jsonl --labels labels.json",
    "objhal": "--responses objhal.jsonl --labels labels.json",
    "pope": "--responses pope.jsonl --labels coco_pope_random.json",
    "amber": "--responses amber.json --annotations amber",
    "mmhal": "--responses mmhal.json",
}


def run(name: str, options: str, code: int = 0) -> dict[str, Any]:
    """Evaluate in the folder of those files; returns the summary of a run that ends well."""
    assert cli.main(["evaluate", name, "--output_dir", "out", *options.split()]) == code
    if code:
        return {}
    found: dict[str, Any] = json.loads(Path("out/summary.json").read_text())
    return found


def lines(path: Path, *rows: Any) -> None:
    """Write lines of JSON, or of text as it is."""
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
