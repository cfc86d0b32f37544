"""What `mmalign evaluate image` samples, measures and writes."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compared_models import PROMPTS, FakeAdapter, paint, read, win_rates
from PIL import Image
from torch import Tensor

from mmalign.config import (
    EvalConfig,
    EvaluateImageConfig,
    RewardConfig,
    SamplingConfig,
)
from mmalign.evaluation import plan
from mmalign.pipelines import _subject_images, evaluate_image
from mmalign.pipelines._evaluation import Judges, judge_rewards, measure, sample_side
from mmalign.rewards.brightness import LUMA
from mmalign.types import InputError


def test_writes_summary_report_and_images(comparison: EvaluateImageConfig, capfd: Any) -> None:
    evaluate_image.run(comparison)
    folder = Path(comparison.output_dir)
    summary = read(comparison, "summary.json")
    assert summary["method"] == "evaluate"
    assert (summary["model"], summary["seed"]) == (comparison.model, 3)
    assert set(summary["before"]) == {"saturation", "brightness", "diversity"}
    gain = summary["after"]["brightness"] - summary["before"]["brightness"]
    assert gain == pytest.approx(0.2, abs=1e-3)  # pixels are rounded to 8 bits
    assert summary["metrics"] == summary["after"]
    low, high = summary["ci95"]["brightness"]
    assert low <= summary["metrics"]["brightness"] <= high
    assert summary["win_rate"]["value"] == 1.0
    assert (summary["win_rate"]["judge"], summary["win_rate"]["n"]) == ("brightness", 4)
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;two&lt;/b&gt; blue squares" in report
    assert "<b>two" not in report
    assert not re.search(r'(src|href)="(?!data:)', report)
    assert report.count("data:image/png;base64,") == 8  # two prompts, and two best cases
    out = "".join(capfd.readouterr())
    assert "after over before: win rate 1.00 [1.00, 1.00] by brightness: 4 wins, 0 losses" in out
    assert "saturation" in out
    assert not (folder / "README.md").exists()


def test_samples_are_the_evaluated_images(comparison: EvaluateImageConfig) -> None:
    evaluate_image.run(comparison)
    samples = Path(comparison.output_dir) / "samples"
    rows = [json.loads(line) for line in (samples / "metadata.jsonl").read_text().splitlines()]
    prompts, seeds = plan(PROMPTS, 2, 3)
    assert [(row["prompt"], row["seed"]) for row in rows] == list(zip(prompts, seeds, strict=True))
    expected = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(seeds[3])) * 0.5
    image = np.array(Image.open(samples / rows[3]["before_file_name"])).astype(float) / 255
    np.testing.assert_allclose(image, expected.permute(1, 2, 0), atol=0.51 / 255)


def test_scale_applies_to_the_adapter_alone(comparison: EvaluateImageConfig) -> None:
    comparison.base_adapter, comparison.adapter, comparison.adapter_scale = "bright", "dim", 0.5
    evaluate_image.run(comparison)
    summary = read(comparison, "summary.json")
    gain = summary["after"]["brightness"] - summary["before"]["brightness"]
    assert gain == pytest.approx(-0.2, abs=1e-3)


def test_several_models_and_a_folder(several: EvaluateImageConfig, capfd: Any) -> None:
    evaluate_image.run(several)
    rates = win_rates(several, "brightness")
    assert len(rates) == 6
    assert rates["strong", "base"]["value"] == rates["strong", "<i>weak</i>"]["value"] == 1.0
    assert rates["dark", "base"]["value"] == 0.0
    # Two prompts of which all images agree: each side is as likely in a quarter of the flips.
    assert {row["p"] for row in rates.values()} == {0.5}
    assert {row["p_holm"] for row in rates.values()} == {1.0}
    metrics = read(several, "results.json")["metrics"]
    assert metrics["brightness"]["strong"]["change"]["value"] == pytest.approx(0.2, abs=1e-3)
    assert metrics["brightness"]["base"]["change"] is None
    assert metrics["diversity"]["dark"]["value"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["diversity"]["base"]["value"] > 0.1
    page = (Path(several.output_dir) / "report.html").read_text(encoding="utf-8")
    assert "6 pairs of subjects" in page
    assert "(Holm)" in page
    assert "&lt;i&gt;weak&lt;/i&gt;" in page
    assert "<i>weak" not in page
    out = "".join(capfd.readouterr())
    assert "strong over base: win rate 1.00" in out
    assert "corrected for the 6 pairs" in out


def test_models_share_prompts_seeds_and_noise(several: EvaluateImageConfig) -> None:
    several.subjects[1].adapter = None  # the same model twice makes the same pictures
    evaluate_image.run(several)
    samples = Path(several.output_dir) / "samples"
    for number in range(4):
        name = f"{number:05d}.png"
        assert (samples / "base" / name).read_bytes() == (samples / "i-weak-i" / name).read_bytes()
    row = win_rates(several, "brightness")["<i>weak</i>", "base"]
    assert (row["value"], row["ties"], row["p"]) == (None, 4, 1.0)


def test_every_score_of_every_image_is_written(several: EvaluateImageConfig) -> None:
    evaluate_image.run(several)
    folder = Path(several.output_dir)
    table = read(several, "scores.json")
    with (folder / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(table) == len(rows) == 16
    for row, record in zip(rows, table, strict=True):
        assert {key: str(value) for key, value in record.items()} == row
        pixels = np.array(Image.open(folder / row["file_name"])).astype(float) / 255
        luma = (pixels @ LUMA).mean()
        assert float(row["brightness"]) == pytest.approx(luma, abs=1e-5)
    assert {row["prompt"] for row in rows} == set(PROMPTS)
    assert list(rows[0])[:5] == ["subject", "file_name", "prompt", "number", "seed"]


def test_baseline_is_chosen_by_name(several: EvaluateImageConfig) -> None:
    several.baseline = "strong"
    evaluate_image.run(several)
    assert read(several, "results.json")["baseline"] == "strong"
    assert win_rates(several, "brightness")["base", "strong"]["value"] == 0.0
    several.baseline = "stronger"
    with pytest.raises(InputError, match="no subject is called 'stronger': base, "):
        evaluate_image.run(several)


def test_cases_are_the_largest_gains_and_losses(
    comparison: EvaluateImageConfig, tmp_path: Path
) -> None:
    prompts = [f"prompt {number}" for number in range(9)]
    gray = [(prompt, (100, 100, 100)) for prompt in prompts]
    other = [(prompt, (100 + 10 * (n - 4),) * 3) for n, prompt in enumerate(prompts)]
    comparison.adapter = None
    comparison.compare = [f"a={paint(tmp_path / 'a', gray)}", f"b={paint(tmp_path / 'b', other)}"]
    comparison.evaluation.prompts = None
    evaluate_image.run(comparison)
    page = (Path(comparison.output_dir) / "report.html").read_text(encoding="utf-8")
    best, worst = page.partition("largest gains")[2].partition("largest losses")[::2]
    assert re.findall(r"<p>(prompt \d)</p>", best) == [
        "prompt 8",
        "prompt 7",
        "prompt 6",
        "prompt 5",
    ]
    found = re.findall(r"<p>(prompt \d)</p>", worst.partition("<h2>")[0])
    assert found == ["prompt 0", "prompt 1", "prompt 2", "prompt 3"]


def test_images_are_made_once(several: EvaluateImageConfig) -> None:
    evaluate_image.run(several)
    first = len(FakeAdapter.sampled)
    evaluate_image.run(several)
    assert len(FakeAdapter.sampled) == first == 12
    several.subjects[2].adapter_scale = 2.0
    Path(several.output_dir, "samples", "base", "00001.png").unlink()
    evaluate_image.run(several)  # only what has changed, and what is missing
    assert FakeAdapter.sampled[first:] == ["a red circle", *PROMPTS[:1] * 2, *PROMPTS[1:] * 2]
    assert win_rates(several, "brightness")["strong", "<i>weak</i>"]["value"] == 1.0


def test_bad_judge_is_found_before_sampling(
    comparison: EvaluateImageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_subject_images, "load_adapter", None)
    comparison.evaluation.judge = RewardConfig(name="brightnes")
    with pytest.raises(InputError, match="did you mean 'brightness'"):
        evaluate_image.run(comparison)


def test_judge_with_metrics_and_words(
    several: EvaluateImageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_image, "load_judges", lambda *_: Judges([], Wordy()))
    evaluate_image.run(several)
    metrics = read(several, "results.json")["metrics"]
    assert (metrics["correct"]["strong"]["value"], metrics["correct"]["dark"]["value"]) == (
        1.0,
        0.0,
    )
    page = (Path(several.output_dir) / "report.html").read_text(encoding="utf-8")
    assert "too &lt;dark&gt;" in page
    assert "too <dark>" not in page


class Wordy:
    """A judge that says more than a number."""

    name = "wordy"

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        return samples.mean(dim=(1, 2, 3))

    def metrics(self, samples: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"correct": (self(samples, prompts) > 0.4).float()}

    def verdicts(self, samples: Tensor, prompts: Sequence[str]) -> list[str]:
        return ["bright" if value > 0.4 else "too <dark>" for value in self(samples, prompts)]


def test_training_without_evaluation() -> None:
    config: Any = EvalConfig()
    adapter: Any = None
    assert judge_rewards(config, "auto") == Judges([], None)
    assert sample_side(adapter, config, SamplingConfig(), "sample") is None
    assert measure(None, None, config, Judges([], None), 0) is None
