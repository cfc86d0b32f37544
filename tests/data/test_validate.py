from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from mmalign.data.validate import validate_pairs

Make = Callable[..., Path]


def test_all_problems_are_listed(imagefolder: Make, png: Callable[..., bytes]) -> None:
    folder = imagefolder(
        8,
        row1="{broken",
        row2={"prompt": "", "chosen_file_name": "2_1.png"},
        row3={"chosen_file_name": "../x.png"},
        row4={"chosen_file_name": "0_0.png", "rejected_file_name": "0_1.png", "prompt": "prompt 0"},
        row5={"score_chosen": 1, "score_rejected": 1},
    )
    whole = png(12, (200, 200))
    (folder / "6_0.png").write_bytes(whole[: len(whole) // 2])
    (folder / "6_1.png").write_bytes(b"")
    report = validate_pairs(str(folder), max_pixels=100_000)
    found = {int(bad.where.rpartition(" ")[2]): bad.problem for bad in report.bad_rows}
    assert sorted(found) == [2, 3, 4, 5, 7]
    assert "not JSON" in found[2]
    assert "prompt is empty" in found[3]
    assert "same image" in found[3]
    assert "'..' is not allowed" in found[4]
    assert "the same pair as" in found[5]
    assert "chosen: the image cannot be decoded" in found[7]
    assert "rejected: the image is empty" in found[7]
    assert (report.rows, report.ties, report.duplicates) == (8, 1, 1)


def test_truncation_that_a_header_does_not_show(imagefolder: Make) -> None:
    folder = imagefolder(2)
    from PIL import Image

    Image.effect_noise((300, 300), 50).save(folder / "0_0.png", format="JPEG")
    data = (folder / "0_0.png").read_bytes()
    assert not validate_pairs(str(folder), max_pixels=100_000).bad_rows
    (folder / "0_0.png").write_bytes(data[: len(data) - 2000])
    report = validate_pairs(str(folder), max_pixels=100_000)
    assert "truncated" in report.bad_rows[0].problem


def test_max_pixels(imagefolder: Make) -> None:
    report = validate_pairs(str(imagefolder(2)), max_pixels=119)
    assert len(report.bad_rows) == 2
    assert "12 x 10 pixels" in report.bad_rows[0].problem


def test_format_by_name(imagefolder: Make) -> None:
    folder = imagefolder(1)
    (folder / "train.json").write_text(json.dumps([]))
    assert validate_pairs(str(folder), format="imagefolder", max_pixels=1000).rows == 1
