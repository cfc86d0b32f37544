from __future__ import annotations

import base64
import io
import json
import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mmalign.plots import MAX_POINTS, RAW_ABOVE, chart, panels
from mmalign.plots import Series as Line
from mmalign.report import (
    MAX_PICTURES,
    PICTURE_PIXELS,
    AnswerComparison,
    Comparison,
    Picture,
    Report,
    RunSummary,
    WinRateSummary,
    library_versions,
    peak_memory_mib,
    write_model_card,
    write_report,
    write_summary,
)
from mmalign.types import InputError

HOSTILE = "<script>alert('x')</script> & \"quotes\""


def summary(**changes: Any) -> RunSummary:
    fields: dict[str, Any] = {
        "method": "diffusion-dpo",
        "model": "org/model",
        "seed": 3,
        "steps": 1200,
        "wall_seconds": 61.5,
        "peak_memory_mib": 812.25,
        "device": "cpu",
        "versions": {"torch": "2.15.0"},
        "before": {"clip": 0.21, "correct": 0.5},
        "after": {"clip": 0.26, "correct": 0.75},
        "win_rate": WinRateSummary(0.8, (0.7, 0.9), "parser", 50, 32, 8, 10, 0.74),
    }
    return RunSummary(**(fields | changes))


def comparison(prompt: str, size: int = 8, **changes: Any) -> Comparison:
    image = torch.rand(3, size, size)
    before = Picture(image=image, verdict="square missing", good=False)
    after = Picture(image=1 - image, verdict="all there", good=True)
    fields: dict[str, Any] = {"prompt": prompt, "seed": 11, "before": before, "after": after}
    return Comparison(**(fields | changes))


def render(tmp_path: Path, **parts: Any) -> str:
    report = Report(**({"summary": summary()} | parts))
    return write_report(tmp_path, report).read_text(encoding="utf-8")


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_summary_has_exactly_the_documented_fields(tmp_path: Path) -> None:
    content = json.loads(write_summary(tmp_path, summary()).read_text())
    assert set(content) == {
        "method", "model", "seed", "steps", "wall_seconds", "peak_memory_mib", "device",
        "versions", "before", "after", "win_rate",
    }  # fmt: skip
    assert content["before"] == {"clip": 0.21, "correct": 0.5}
    assert content["win_rate"]["value"] == 0.8
    assert content["win_rate"]["ci95"] == [0.7, 0.9]
    assert content["win_rate"]["judge"] == "parser"
    assert content["win_rate"]["n"] == 50


def test_summary_of_an_evaluation_has_metrics(tmp_path: Path) -> None:
    content = json.loads(write_summary(tmp_path, summary(metrics={"clip": 0.26})).read_text())
    assert content["metrics"] == {"clip": 0.26}


def test_summary_of_training_has_cost(tmp_path: Path) -> None:
    content = json.loads(write_summary(tmp_path, summary(cost={"unet_forwards": 7})).read_text())
    assert content["cost"] == {"unet_forwards": 7}


def test_summary_is_valid_json_without_a_winner(tmp_path: Path) -> None:
    nan = math.nan
    rate = WinRateSummary(nan, (nan, nan), "parser", 5, 0, 0, 5, 0.5)
    text = write_summary(tmp_path, summary(win_rate=rate)).read_text()
    assert "NaN" not in text
    assert json.loads(text)["win_rate"]["ci95"] == [None, None]
    assert "no winner" in render(tmp_path, summary=summary(win_rate=rate))


def test_report_needs_nothing_from_outside(tmp_path: Path) -> None:
    records = [{"step": step, "loss": 1 / step} for step in range(1, 9)]
    text = render(tmp_path, comparisons=[comparison("a cat")], metrics=records)
    page = Page(text)
    links = [attrs[key] for _, attrs in page.tags for key in ("src", "href") if key in attrs]
    assert len(links) == 2
    assert all(str(link).startswith("data:image/png;base64,") for link in links)
    assert "url(" not in text
    assert "@import" not in text
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}


def test_report_shows_headline_table_and_verdicts(tmp_path: Path) -> None:
    text = render(
        tmp_path,
        comparisons=[comparison("a cat", outcome="after wins")],
        changes={"clip": (0.02, 0.08)},
        config="beta: 5000.0",
        warnings=["beta x margin has saturated"],
    )
    words = re.sub(r"\s+", " ", " ".join(Page(text).words))
    for expected in (
        "80 %", "70 % to 90 %", "32 wins, 8 losses, 10 ties in 50 pairs", "0.21", "0.26", "+0.05",
        "[+0.02, +0.08]", "✗", "square missing", "✓", "all there", "after wins",
        "a cat", "beta: 5000.0", "beta x margin has saturated", "1,200", "2.15.0",
    ):  # fmt: skip
        assert expected in words, expected


def test_report_says_in_words_what_it_shows(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 4), "red")
    said = AnswerComparison(
        prompt="What is it?",
        images=[picture],
        before=[("A ", False), ("cat", True)],
        after=[("Red", False)],
    )
    records = [{"step": step, "loss": 1 / step} for step in (1, 2, 4)]
    parts = {"comparisons": [comparison("a cat")], "metrics": records}
    tags = Page(render(tmp_path, answers=[said], **parts)).tags
    assert [attrs["alt"] for tag, attrs in tags if tag == "img"] == [
        "before: a cat",
        "after: a cat",
        "what is asked about: What is it?",
    ]
    charts = [attrs["aria-label"] for tag, attrs in tags if tag == "svg" and "aria-label" in attrs]
    assert charts == ["Loss: loss 1 at step 1 to 0.25 at step 4"]
    scrolled = [attrs for _, attrs in tags if attrs.get("class") == "scroll"]
    assert [(a["tabindex"], a["aria-label"]) for a in scrolled] == [("0", "Before and after")]
    assert "Wrong words are marked" in render(tmp_path, answers=[said])
    assert "Wrong words" not in render(tmp_path, answers=[replace(said, before=said.after)])


def test_report_without_evaluation_or_metrics(tmp_path: Path) -> None:
    text = render(tmp_path, summary=summary(before={}, after={}, win_rate=None))
    assert "Before and after" not in text
    assert "win rate" not in text


def test_hostile_text_is_escaped_everywhere(tmp_path: Path) -> None:
    picture = Picture(image=torch.rand(3, 4, 4), verdict=HOSTILE)
    text = render(
        tmp_path,
        summary=summary(
            method=HOSTILE,
            model=HOSTILE,
            device=HOSTILE,
            versions={HOSTILE: HOSTILE},
            before={HOSTILE: 1.0},
            after={HOSTILE: 2.0},
            win_rate=WinRateSummary(0.8, (0.7, 0.9), HOSTILE, 5, 4, 1, 0, 0.8),
        ),
        comparisons=[comparison(HOSTILE, before=picture, outcome=HOSTILE)],
        metrics=[{"step": 1, HOSTILE: 1.0}, {"step": 2, HOSTILE: 2.0}],
        config=HOSTILE,
        warnings=[HOSTILE],
    )
    assert "<script" not in text
    assert "script" not in {tag for tag, _ in Page(text).tags}
    assert text.count("&lt;script&gt;") >= 11


def test_pictures_are_the_images(tmp_path: Path) -> None:
    item = comparison("a cat", size=6)
    sources = [attrs["src"] for tag, attrs in Page(render(tmp_path, comparisons=[item])).tags
               if tag == "img"]  # fmt: skip
    assert len(sources) == 2
    data = base64.b64decode(str(sources[0]).removeprefix("data:image/png;base64,"))
    pixels = np.array(Image.open(io.BytesIO(data))).astype(float) / 255
    np.testing.assert_allclose(pixels, item.before.image.permute(1, 2, 0), atol=0.51 / 255)


def test_large_pictures_are_made_smaller(tmp_path: Path) -> None:
    text = render(tmp_path, comparisons=[comparison("a cat", size=PICTURE_PIXELS + 80)])
    source = next(str(attrs["src"]) for tag, attrs in Page(text).tags if tag == "img")
    image = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    assert image.size == (PICTURE_PIXELS, PICTURE_PIXELS)


def test_long_lists_are_thinned_evenly_to_the_first_seed(tmp_path: Path) -> None:
    items = [comparison(f"prompt {i // 2}.", seed=i) for i in range(200)]
    words = " ".join(Page(render(tmp_path, comparisons=items)).words)
    shown = [int(number) for number in re.findall(r"prompt (\d+)\.", words)]
    assert len(shown) == MAX_PICTURES
    assert shown == [index * 100 // MAX_PICTURES for index in range(MAX_PICTURES)]
    assert re.findall(r"seed (\d+)", words)[-MAX_PICTURES:] == [str(2 * number) for number in shown]


def test_well_known_metrics_share_a_panel() -> None:
    record = {
        "step": 1, "loss": 0.7, "lr": 1e-5, "grad_norm": 0.1, "odd_one": 3.0, "stage": 0,
        "rewards/accuracy": 0.5, "rewards/margin": 0.0, "rewards/chosen": 0.1,
        "rewards/rejected": 0.1, "denoising_error/policy_chosen": 0.2,
        "denoising_error/policy_rejected": 0.2,
    }  # fmt: skip
    found = {panel.title: [line.name for line in panel.series] for panel in panels([record])}
    assert list(found)[:3] == ["Loss", "Implicit accuracy", "Margin"]
    assert found["Implicit rewards"] == ["rewards/chosen", "rewards/rejected"]
    assert len(found["Denoising error"]) == 2
    assert found["odd_one"] == ["odd_one"]


def test_values_that_are_missing_are_left_out() -> None:
    records: list[dict[str, float | None]] = [
        {"step": 1, "loss": None}, {"step": 2, "loss": math.inf}, {"step": 3, "loss": 0.5},
    ]  # fmt: skip
    (panel,) = panels(records)
    assert panel.series[0].points == [(3.0, 0.5)]
    assert "<circle" in panel.svg


def points(svg: str, css: str) -> list[tuple[float, float]]:
    match = re.search(rf'<polyline class="{css} s0" points="([^"]*)"', svg)
    assert match
    return [tuple(map(float, pair.split(","))) for pair in match[1].split()]  # type: ignore[misc]


def test_chart_draws_to_scale() -> None:
    drawn = points(chart([Line("x", [(0, 0.0), (5, 1.0), (10, 0.0)])], "x"), "line")
    assert drawn[1][0] == pytest.approx((drawn[0][0] + drawn[2][0]) / 2, abs=0.1)
    assert drawn[0][1] == drawn[2][1] > drawn[1][1]


def test_noisy_lines_are_smoothed_and_long_ones_thinned() -> None:
    noisy = [(float(i), float(i % 2)) for i in range(5 * MAX_POINTS)]
    svg = chart([Line("x", noisy)], "x")
    assert len(points(svg, "raw")) == MAX_POINTS
    heights = [y for _, y in points(svg, "line")]
    raw = [y for _, y in points(svg, "raw")]
    assert max(heights) - min(heights) < 0.5 * (max(raw) - min(raw))
    steady = [(float(i), float(i)) for i in range(5 * RAW_ABOVE)]
    assert "raw" not in chart([Line("x", steady)], "x")


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-12, 1e30])
def test_constant_line(value: float) -> None:
    assert "nan" not in chart([Line("x", [(1, value), (2, value)])], "x")


def test_model_card(tmp_path: Path) -> None:
    text = write_model_card(tmp_path, summary()).read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == "org/model"
    assert "| clip | 0.21 | 0.26 |" in body
    assert 'load_lora_weights("adapter")' in body
    whole = write_model_card(tmp_path, summary(), lora=False).read_text()
    assert 'from_pretrained("model")' in whole
    assert "lora" not in whole.lower()
    hostile = write_model_card(tmp_path, summary(model='x"\n---\n<script>')).read_text()
    assert "<script>" not in hostile
    assert yaml.safe_load(hostile.split("\n---\n")[0].removeprefix("---\n"))["tags"]
    link = write_model_card(tmp_path, summary(model="a](javascript:b) ![c](d)\n# e |")).read_text()
    assert r"# diffusion-dpo on a\](javascript:b) !\[c\](d) # e \|" in link


def test_versions_and_memory() -> None:
    found = library_versions()
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"]
    assert {"python", "mmalign", "diffusers", "open-clip-torch"} <= set(found)
    assert 10 < peak_memory_mib() < 1e6


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match=r"cannot write .*summary\.json"):
        write_summary(tmp_path / "file", summary())


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_summary(tmp_path, summary(seed=1))

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_summary(tmp_path, summary(seed=2))
    assert json.loads((tmp_path / "summary.json").read_text())["seed"] == 1
