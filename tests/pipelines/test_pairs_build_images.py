"""Pairs of existing pictures: which are taken, copied and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_candidates import build, metadata
from PIL import Image

from mmalign.config import PairsBuildConfig
from mmalign.data.schema import CHOSEN_FILE, REJECTED_FILE
from mmalign.types import InputError


@pytest.fixture
def existing(building: PairsBuildConfig, tmp_path: Path) -> PairsBuildConfig:
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    rows = []
    for number in range(6):
        name = f"deep/{number}.png" if number % 2 else f"{number}.jpg"
        size = (8, 8) if number < 4 else (6 + number, 8)
        Image.new("RGB", size, (40 * number,) * 3).save(folder / name)
        rows.append({"file_name": name, "prompt": f"prompt {number % 2}"})
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    building.images = str(folder)
    building.prompts = str(folder / "prompts.jsonl")
    return building


def test_existing_images(existing: PairsBuildConfig) -> None:
    table = build(existing)
    output = Path(existing.output)
    assert [pair.prompt for pair in table.pairs] == ["prompt 0", "prompt 1"]
    rows = metadata(existing)
    assert [Path(row[CHOSEN_FILE]).suffix for row in rows] == [".jpg", ".png"]
    source = Path(str(existing.images))
    assert (output / rows[0][CHOSEN_FILE]).read_bytes() == (source / "4.jpg").read_bytes()
    assert (output / rows[1][REJECTED_FILE]).read_bytes() == (source / "deep/1.png").read_bytes()
    assert not (output / "candidates").exists()


def test_existing_images_inside_the_output_are_not_copied(existing: PairsBuildConfig) -> None:
    existing.output = str(existing.images)
    build(existing)
    assert metadata(existing)[0][CHOSEN_FILE] == "4.jpg"
    assert not (Path(existing.output) / "images").exists()


def test_unreadable_existing_image(existing: PairsBuildConfig) -> None:
    (Path(str(existing.images)) / "deep" / "5.png").write_bytes(b"text")
    with pytest.raises(InputError, match=r"5\.png: not an image"):
        build(existing)
    existing.on_bad_row = "skip"
    table = build(existing)
    assert [bad.where.rpartition("/")[2] for bad in table.bad_rows] == ["5.png"]
    assert len(table.pairs) == 2
    assert len(build(existing).bad_rows) == 1


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"file_name": "../secret.png", "prompt": "x"}', "'..' is not allowed"),
        ('{"file_name": "no.png", "prompt": "x"}', "does not exist"),
        ('{"file_name": "0.jpg", "prompt": "x"}', "named a second time"),
        ('{"file_name": "0.jpg", "prompt": ""}', "prompt is empty"),
        ('{"filename": "0.jpg", "prompt": "x"}', "the nearest present is 'filename'"),
        ("{", "not JSON"),
    ],
)
def test_bad_lines_of_the_prompt_file(existing: PairsBuildConfig, line: str, problem: str) -> None:
    file = Path(existing.prompts)
    file.write_text(file.read_text() + "\n" + line)
    with pytest.raises(InputError, match=rf"prompts\.jsonl line 7: .*{problem}"):
        build(existing)
    existing.on_bad_row = "skip"
    table = build(existing)
    assert (len(table.pairs), len(table.bad_rows)) == (2, 1)
