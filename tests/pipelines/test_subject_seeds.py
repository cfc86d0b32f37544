"""The page of `evaluate image` says of a picture only what it was made of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from mmalign import cli
from mmalign.data.files import write_jsonl

PROMPTS = ["red circle", "blue square"]


def paint(folder: Path, level: int) -> str:
    folder.mkdir()
    for index in range(2):
        Image.new("RGB", (64, 64), (level + index,) * 3).save(folder / f"{index}.png")
    rows = [{"file_name": f"{index}.png", "prompt": prompt} for index, prompt in enumerate(PROMPTS)]
    write_jsonl(folder / "metadata.jsonl", rows)
    return str(folder)


def page(tmp_path: Path, subjects: list[str]) -> str:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    arguments = ["evaluate", "image", "--compare", *subjects, "--output_dir", str(tmp_path / "run")]
    arguments += ["--evaluation.judge.name", "brightness", "--evaluation.images_per_prompt", "1"]
    arguments += ["--evaluation.prompts", str(tmp_path / "prompts.txt"), "--device", "cpu"]
    assert cli.main([*arguments, "--sampling.num_inference_steps", "1"]) == 0
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    return re.sub(r"<dt>seed</dt>", "", html[: html.index("How it was made")])


def test_pictures_of_folders_have_no_seed(tmp_path: Path) -> None:
    html = page(tmp_path, [f"a={paint(tmp_path / 'a', 9)}", f"b={paint(tmp_path / 'b', 99)}"])
    assert "seed" not in html
    assert "noise" not in html


@pytest.mark.parametrize("mixed", [True, False])
def test_models_have_one(mixed: bool, tiny_sd: Path, tmp_path: Path) -> None:
    other = f"dark={paint(tmp_path / 'a', 9)}" if mixed else f"other={tiny_sd}"
    html = page(tmp_path, [f"model={tiny_sd}", other])
    seeds = re.findall(r"seed \d+( of model)?<", html)
    assert len(seeds) >= 2  # of two rows of pictures, and of the cases
    assert set(seeds) == {" of model" if mixed else ""}
    assert ("and the same noise" in html) == (not mixed)
