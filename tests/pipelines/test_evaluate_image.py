from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmalign.config import EvalConfig, EvaluateImageConfig, RewardConfig, SamplingConfig
from mmalign.evaluation import plan
from mmalign.pipelines import evaluate_image
from mmalign.pipelines._evaluation import Judges, judge_rewards, measure, sample_side
from mmalign.types import InputError

PROMPTS = ["a red circle", "<b>two</b> blue squares"]


class FakeAdapter:
    """Noise by seed; an adapter makes it brighter by its scale."""

    def __init__(self, config: EvaluateImageConfig) -> None:
        self.gain = 0.2 * config.adapter_scale if config.adapter == "bright" else 0.0

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: SamplingConfig
    ) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = [torch.rand(3, 8, 8, generator=generator) for generator in generators]
        return torch.stack(noise) * 0.5 + self.gain


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvaluateImageConfig:
    def load(config: EvaluateImageConfig, *, device: str, for_training: bool) -> FakeAdapter:
        assert not for_training
        return FakeAdapter(config)

    monkeypatch.setattr(evaluate_image, "load_adapter", load)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return EvaluateImageConfig(
        adapter="bright",
        device="cpu",
        output_dir=str(tmp_path / "run"),
        sampling=SamplingConfig(seed=3, batch_size=3),
        evaluation=EvalConfig(
            prompts=str(tmp_path / "prompts.txt"),
            images_per_prompt=2,
            rewards=[RewardConfig(name="saturation")],
            judge=RewardConfig(name="brightness"),
        ),
    )


def test_writes_summary_report_and_images(config: EvaluateImageConfig, capfd: Any) -> None:
    evaluate_image.run(config)
    folder = Path(config.output_dir)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["method"] == "evaluate"
    assert summary["seed"] == 3
    assert set(summary["before"]) == {"saturation", "brightness", "diversity"}
    gain = summary["after"]["brightness"] - summary["before"]["brightness"]
    assert gain == pytest.approx(0.2, abs=1e-6)
    assert summary["metrics"] == summary["after"]
    assert summary["win_rate"]["value"] == 1.0
    assert (summary["win_rate"]["judge"], summary["win_rate"]["n"]) == ("brightness", 4)
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;two&lt;/b&gt; blue squares" in report
    assert report.count("data:image/png;base64,") == 4
    out = "".join(capfd.readouterr())
    assert "win rate 1.00 [1.00, 1.00] by brightness: 4 wins, 0 losses, 0 ties" in out
    assert "saturation" in out
    assert not (folder / "README.md").exists()


def test_samples_are_the_evaluated_images(config: EvaluateImageConfig) -> None:
    evaluate_image.run(config)
    samples = Path(config.output_dir) / "samples"
    rows = [json.loads(line) for line in (samples / "metadata.jsonl").read_text().splitlines()]
    prompts, seeds = plan(PROMPTS, 2, 3)
    assert [(row["prompt"], row["seed"]) for row in rows] == list(zip(prompts, seeds, strict=True))
    expected = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(seeds[3])) * 0.5
    image = np.array(Image.open(samples / rows[3]["before_file_name"])).astype(float) / 255
    np.testing.assert_allclose(image, expected.permute(1, 2, 0), atol=0.51 / 255)


def test_scale_applies_to_the_adapter_alone(config: EvaluateImageConfig) -> None:
    config.base_adapter, config.adapter, config.adapter_scale = "bright", "dim", 0.5
    evaluate_image.run(config)
    summary = json.loads((Path(config.output_dir) / "summary.json").read_text())
    gain = summary["after"]["brightness"] - summary["before"]["brightness"]
    assert gain == pytest.approx(-0.2, abs=1e-6)


def test_nothing_to_compare(config: EvaluateImageConfig) -> None:
    config.adapter = None
    with pytest.raises(InputError, match="nothing to compare"):
        evaluate_image.run(config)


def test_missing_and_empty_prompts(config: EvaluateImageConfig, tmp_path: Path) -> None:
    config.evaluation.prompts = None
    with pytest.raises(InputError, match=r"evaluation\.prompts is missing"):
        evaluate_image.run(config)
    (tmp_path / "empty.txt").write_text("")
    config.evaluation.prompts = str(tmp_path / "empty.txt")
    with pytest.raises(InputError, match=r"empty\.txt"):
        evaluate_image.run(config)


def test_bad_judge_is_found_before_sampling(
    config: EvaluateImageConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_image, "load_adapter", None)
    config.evaluation.judge = RewardConfig(name="brightnes")
    with pytest.raises(InputError, match="did you mean 'brightness'"):
        evaluate_image.run(config)


def test_training_without_evaluation() -> None:
    config: Any = EvalConfig()
    adapter: Any = None
    assert judge_rewards(config, "auto") == Judges([], None)
    assert sample_side(adapter, config, SamplingConfig(), "sample") is None
    assert measure(None, None, config, Judges([], None), 0) is None
