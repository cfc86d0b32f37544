"""The hallucination benchmarks from the command line: files in, numbers and page out."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from benchmark_files import RUNS, run, write
from PIL import Image

SHARED = Path(__file__).parents[3] / "shared"


@pytest.mark.parametrize("name", RUNS)
def test_every_benchmark_writes_its_results(files: Path, name: str) -> None:
    summary = run(name, RUNS[name])
    assert summary["method"] == f"evaluate {name}"
    assert summary["before"] == summary["after"] == {}
    assert summary["win_rate"] is None
    metrics, ci95 = summary["metrics"], summary["ci95"]
    assert {"length", "yes_rate", "no_rate", "coverage"} <= set(metrics)
    assert metrics["length"] > 0
    assert ci95
    for key, (low, high) in ci95.items():
        assert low <= high, key
    cases = (files / "out/cases.jsonl").read_text().splitlines()
    assert len(cases) == {"amber": 3}.get(name, 2)
    assert "<h1>" in (files / "out/report.html").read_text()


def test_answers_are_scored_without_torch(files: Path) -> None:
    program = (
        "import sys\nfrom mmalign.cli import main\n"
        f"for name, options in {RUNS!r}.items():\n"
        "    assert main(['evaluate', name, '--output_dir', 'out', *options.split()]) == 0\n"
        "assert not {'torch', 'transformers', 'diffusers', 'datasets'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_official_names_in_lower_case(files: Path) -> None:
    expected = {
        "chair": {"chairs": 0.5, "chairi": 1 / 4, "recall": 1.0},
        "objhal": {"chairs_refine": 0.5, "chairi": 1 / 4, "obj_rec": 1.0, "avg_word_len": 5.5},
        "pope": {"accuracy": 0.5, "precision": 0.5, "recall": 1, "f1": 2 / 3, "yes_ratio": 1},
        "amber": {"chair": 50.0, "cover": 99.9, "hal": 100.0, "cog": 99.9, "existence_recall": 0.0},
        "mmhal": {"average_score": 3.5, "hallucination_rate": 0.5, "informativeness": 200 / 3},
    }
    for name, metrics in expected.items():
        found = run(name, RUNS[name])["metrics"]
        assert {key: found[key] for key in metrics} == pytest.approx(metrics), name


def test_strict_fixed_reads_what_was_said(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run("pope", RUNS["pope"])["metrics"]["accuracy"] == 0.5
    assert "1 of 2 answers read differently with strict fixed" in caplog.text
    assert run("pope", f"{RUNS['pope']} --strict fixed")["metrics"]["accuracy"] == 1
    fixed = run("amber", f"{RUNS['amber']} --strict fixed")["metrics"]
    assert fixed["existence_recall"] == pytest.approx(99.9)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared with the benchmark's files")
def test_all_splits_of_pope(files: Path) -> None:
    answers = f"{SHARED}/golden/pope_answers_{{split}}.jsonl"
    summary = run(
        "pope",
        f"--responses {answers} --annotations {SHARED}/benchmarks/pope --split all --resamples 50",
    )
    metrics = summary["metrics"]
    f1s = {"random": 0.7193944139911251, "popular": 0.7216279676493608}
    f1s["adversarial"] = 0.7318727177882107
    assert {split: metrics[f"{split}_f1"] for split in f1s} == f1s
    assert metrics["f1"] == pytest.approx(sum(f1s.values()) / 3)
    assert metrics["random_tp"] == 1378
    assert "tp" not in metrics
    low, high = summary["ci95"]["f1"]
    assert low < metrics["f1"] < high


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared with the benchmark's files")
def test_real_files_of_amber(files: Path) -> None:
    folder = f"{SHARED}/benchmarks/amber"
    answers = f"{SHARED}/golden/amber_responses.json"
    options = f"--responses {answers} --annotations {folder} --resamples 50"
    metrics = run("amber", options)["metrics"]
    expected = {
        "chair": 16.3,
        "cover": 58.2,
        "hal": 51.2,
        "cog": 13.7,
        "accuracy": 29.7,
        "f1": 41.4,
    }
    assert {name: metrics[name] for name in expected} == expected
    assert metrics["coverage"] == pytest.approx(0.582, abs=1e-3)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_page_shows_worst_cases_and_runs_nothing(files: Path) -> None:
    pictures = files / "pictures"
    pictures.mkdir()
    Image.new("RGB", (900, 600), "red").save(pictures / "COCO_val2014_000000000001.png")
    (pictures / "2.png").write_bytes(b"no image")
    run("chair", f"{RUNS['chair']} --images pictures")
    text = (files / "out/report.html").read_text()
    page = Page(text)
    names = [name for name, _ in page.tags]
    assert "script" not in names
    assert "&lt;script&gt;" in text
    assert '<mark class="bad">car</mark>' in text
    assert '<mark class="good">dog</mark>' in text
    (image,) = [attrs for name, attrs in page.tags if name == "img"]
    assert str(image["src"]).startswith("data:image/jpeg;base64,")
    links = [value for _, attrs in page.tags for key, value in attrs.items() if key == "href"]
    assert links == []
    assert "default-src 'none'" in text


@pytest.mark.parametrize("name", RUNS)
def test_text_that_no_file_can_hold(files: Path, name: str) -> None:
    """JSON can hold half a surrogate pair, and so can a model's answer."""
    path = files / RUNS[name].split()[1]
    path.write_text(path.read_text().replace("dog", "dog \\ud800").replace("Yes", "Yes \\udfff"))
    assert "\\ud" in path.read_text()
    assert run(name, RUNS[name])["metrics"]["length"] > 0


def test_page_without_mistakes(files: Path) -> None:
    write(files / "captions.jsonl", [{"image_id": i, "caption": "Nothing"} for i in (1, 2)])
    summary = run("chair", RUNS["chair"])
    assert summary["metrics"]["chairi"] is None  # no object was mentioned
    assert "Not one answer is wrong" in (files / "out/report.html").read_text()
