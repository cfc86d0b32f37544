"""Hallucination benchmarks of real, tiny checkpoints: what a model answers is what is scored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from skimage import data as photographs

from mmalign import cli

FAMILIES = ["llava", "qwen2_5_vl"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate(("astronaut", "coffee", "chelsea"), 1):
        photo = Image.fromarray(getattr(photographs, name)()).convert("RGB")
        photo.resize((60, 40)).save(folder / f"COCO_val2014_{number:012}.jpg")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_of_a_checkpoint(
    tmp_path: Path, photos: Path, vlm: Callable[[str], Path], family: str
) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"1": ["person"], "2": ["cup", "spoon"], "3": ["cat"]}))
    out = tmp_path / "out"
    options = ["--output_dir", str(out), "--labels", str(labels)]
    model = ["--model", str(vlm(family)), "--images", str(photos), "--device", "cpu"]
    short = ["--generation.max_new_tokens", "6"]
    assert cli.main(["evaluate", "chair", *options, *model, *short]) == 0
    first = json.loads((out / "summary.json").read_text())
    rows = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    assert [row["image_id"] for row in rows] == [1, 2, 3]
    assert first["model"] == str(vlm(family))
    saved = ["--responses", str(out / "responses.jsonl")]
    assert cli.main(["evaluate", "chair", *options, *saved]) == 0
    assert json.loads((out / "summary.json").read_text())["metrics"] == first["metrics"]


def test_missing_checkpoint(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"1": ["person"]}))
    argv = ["evaluate", "chair", "--model", str(tmp_path), "--images", str(photos)]
    assert cli.main([*argv, "--labels", str(labels), "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path) in error
