from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from mmalign.config import PairsCheckConfig
from mmalign.data.validate import validate_pairs
from mmalign.pipelines import pairs_stats


def make(folder: Path, scores: list[float | None]) -> Path:
    rows = []
    for number, score in enumerate(scores):
        for side, color in (("c", 0), ("r", 100)):
            picture = Image.new("RGB", (8, 8), (20 * number, color, 0))
            picture.save(folder / f"{number}{side}.png")
        row = {
            "prompt": f"prompt {number // 2}",
            "chosen_file_name": f"{number}c.png",
            "rejected_file_name": f"{number}r.png",
            "score_chosen": score,
            "score_rejected": 0.0,
        }
        rows.append(json.dumps(row))
    rows.append("broken")
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def test_numbers_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = make(tmp_path, [1.0, 2.0, 0.0, 3.0]), tmp_path / "gaps.png"
    pairs_stats.run(PairsCheckConfig(path=str(path), output=str(output)))
    out = capsys.readouterr().out
    for line in ("pairs     3", "prompts   2", "ties      1 ", "bad rows  1 ", "  p50    2\n"):
        assert line in out
    with Image.open(output) as picture:
        assert picture.format == "PNG"


def test_without_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = make(tmp_path, [None, None]), tmp_path / "gaps.png"
    pairs_stats.run(PairsCheckConfig(path=str(path), output=str(output)))
    assert "there is no histogram" in capsys.readouterr().out
    assert not output.exists()


def test_bad_rows_are_those_of_validate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path, [1.0, 2.0])
    Image.effect_noise((32, 32), 50).save(tmp_path / "0c.png")
    whole = (tmp_path / "0c.png").read_bytes()
    (tmp_path / "0c.png").write_bytes(whole[: len(whole) // 2])  # the header is intact
    pairs_stats.run(PairsCheckConfig(path=str(path), output=str(tmp_path / "gaps.png")))
    assert "pairs     1\n" in (out := capsys.readouterr().out)
    assert "bad rows  2 " in out
    report = validate_pairs(str(path), max_pixels=10**6)
    assert len(report.bad_rows) == 2
