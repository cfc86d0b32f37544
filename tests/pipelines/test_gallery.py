"""`mmalign gallery`: what a page of runs shows, and what it does not believe."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmalign import cli
from mmalign.data.files import write_jsonl
from mmalign.pipelines._vlm_results import save_answers
from mmalign.report import AnswerComparison

SUMMARY = {
    "method": "curriculum-dpo <b>",
    "model": "pkg://mmalign.shapes/models/sd",
    "seed": 7,
    "steps": 260,
    "wall_seconds": 125.0,
    "peak_memory_mib": 1500.5,
    "device": "cpu",
    "before": {"clip": 0.75, "correct": 0.31},
    "after": {"clip": 0.79, "correct": 0.38, "kl": None},
    "win_rate": {"value": 0.69, "ci95": [0.62, 0.76], "judge": "parser", "wins": 71},
    "cost": {"unet_forwards": 16640, "train_seconds": 212.4},
}


def make_run(folder: Path, **changes: Any) -> Path:
    (folder / "samples").mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({**SUMMARY, **changes}))
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A run that made pictures: nine prompts, two of each."""
    folder = make_run(tmp_path / "runs" / "pictures & more")
    rows = []
    for number in range(18):
        row: dict[str, object] = {"prompt": f"prompt {number // 2} <i>"}
        for side, blue in (("before", 0), ("after", 255)):
            name = f"{side}-{number}.png"
            Image.new("RGB", (16, 16), (number, 9, blue)).save(folder / "samples" / name)
            row[f"{side}_file_name"] = name
        rows.append(row)
    write_jsonl(folder / "samples" / "metadata.jsonl", rows)
    (folder / "report.html").write_text("the report")
    return folder


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    """A run that gave answers, as runs on vision-language models leave them."""
    folder = make_run(tmp_path / "runs" / "answers", method="vlm-dpo", win_rate=None)
    said = AnswerComparison(
        prompt="What is there?",
        images=[Image.new("RGB", (20, 20), "red")],
        before=[("a red ", False), ("<dog>", True)],
        after=[("a red square", False)],
    )
    save_answers(folder / "samples", [said, said])
    return folder


def gallery(*argv: object) -> int:
    return cli.main(["gallery", *map(str, argv)])


def test_runs_on_one_page(pictures: Path, answers: Path, tmp_path: Path) -> None:
    page = tmp_path / "gallery.html"
    assert gallery(pictures, answers, "--output", page, "--examples", 3, "--title", "A & B") == 0
    text = page.read_text(encoding="utf-8")
    assert "<h1>A &amp; B</h1>" in text
    assert "curriculum-dpo &lt;b&gt;" in text
    assert "curriculum-dpo <b>" not in text
    assert re.findall(r"<p>(prompt \d) &lt;i&gt;</p>", text) == ["prompt 0", "prompt 3", "prompt 6"]
    assert text.count("data:image/png;base64,") == 3 * 2 + 2
    assert "69\u00a0%" in text
    assert "62\u00a0% to 76\u00a0%" in text
    assert "judge parser: 71 wins" in text
    assert "<mark>&lt;dog&gt;</mark>" in text
    assert "2 min 05 s" in text
    assert "16,640 denoiser rows forward" in text
    assert re.search(r"kl</td><td[^>]*>\u2013</td><td[^>]*>\u2013", text)
    assert 'href="runs/pictures%20%26%20more/report.html"' in text
    assert not re.search(r'(src|href)="(?!data:|runs/)', text)


def test_reports_elsewhere_are_not_linked(pictures: Path, tmp_path: Path) -> None:
    page = tmp_path / "docs" / "page.html"
    assert gallery(pictures, "--output", page) == 0
    assert "href" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not the folder of a run: it has no summary.json"),
        ("{", "is not JSON"),
        ("[" * 10_000, "is not JSON"),
        ("[1]", "is not the summary of a run"),
        ('{"method": 3}', "is not the summary of a run"),
    ],
)
def test_what_is_not_a_run(
    tmp_path: Path, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    assert gallery(tmp_path, "--output", tmp_path / "x.html") == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_no_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert gallery("--output", "x.html") == 2
    assert "runs: give the folders" in capsys.readouterr().err


def test_summary_of_a_stranger(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run",
        win_rate={"value": "1", "ci95": [None, 3]},
        before=[1],
        after={"<script>": 10**400, "ok": True},
        cost={"unet_forwards": "<script>"},
        wall_seconds=None,
    )
    assert gallery(run, "--output", tmp_path / "x.html") == 0
    text = (tmp_path / "x.html").read_text()
    assert "<script" not in text
    assert "win rate" not in text


def test_pictures_outside_the_run_are_refused(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    row = {"prompt": "p", "before_file_name": "../../../secret.png"}
    write_jsonl(pictures / "samples" / "metadata.jsonl", [row])
    assert gallery(pictures, "--output", tmp_path / "x.html") == 2
    assert "'..' is not allowed" in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()


def test_rows_that_are_damaged(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pictures / "samples" / "metadata.jsonl"
    for line, message in (
        ("{", "line 1: the line is not JSON"),
        ('{"prompt": 1}', "line 1: it has no prompt"),
        ('{"prompt": "p", "before": "a", "before_marked": [["a"]]}', "before_marked has a piece"),
    ):
        table.write_text(line)
        assert gallery(pictures, "--output", tmp_path / "x.html") == 2
        assert message in capsys.readouterr().err
