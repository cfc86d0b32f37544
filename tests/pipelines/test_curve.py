"""Evaluations during training, and early stopping by one of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from mmalign.config import DraftConfig, EvalConfig, LoraConfig, RewardConfig, SamplingConfig
from mmalign.pipelines import draft
from mmalign.pipelines._curve import EarlyStopping
from mmalign.preflight import check_config
from mmalign.types import InputError

BRIGHT, SATURATED = RewardConfig(name="brightness"), RewardConfig(name="saturation")
DARKNESS = "tests.pipelines.test_curve:darkness"
DARK = RewardConfig(name=DARKNESS)


def darkness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """What falls whenever brightness, which is trained on, rises."""
    return 1 - images.mean((1, 2, 3))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("red\na red\nred red\n")
    return file


def train(model: Path, prompts: Path, output: Path, max_steps: int = 4, **more: Any) -> None:
    options = {
        "prompts": str(prompts),
        "images_per_prompt": 2,
        "rewards": [BRIGHT, DARK],
        "judge": SATURATED,
        "every_steps": 2,
        "curve_prompts": 2,
        **more.pop("evaluation", {}),
    }
    draft.run(
        DraftConfig(
            model=str(model),
            output_dir=str(output),
            device="cpu",
            offline=True,
            prompts=str(prompts),
            rewards=[BRIGHT],
            lora=LoraConfig(rank=2),
            sampling=SamplingConfig(num_inference_steps=3, guidance_scale=2.0),
            max_steps=max_steps,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            evaluation=EvalConfig(**options),
            **more,
        )
    )


def rows(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "evaluations.jsonl").read_text().splitlines()]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "pytorch_lora_weights.safetensors")


def log(output: Path) -> str:
    return (output / "metrics.jsonl").read_text()


def test_rows_are_what_the_evaluation_measures(
    tiny_sd: Path, prompts: Path, tmp_path: Path
) -> None:
    train(tiny_sd, prompts, tmp_path, evaluation={"curve_prompts": None})
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [0, 2, 4]
    summary = json.loads((tmp_path / "summary.json").read_text())
    for row, expected in ((found[0], summary["before"]), (found[-1], summary["after"])):
        for name in summary["before"]:
            assert row[name] == pytest.approx(expected[name], abs=1e-6), name
    assert [row["reward_queries"] for row in found] == [0, 4, 8]
    assert found[-1]["unet_forwards"] == summary["cost"]["unet_forwards"]
    page = (tmp_path / "report.html").read_text()
    assert "Evaluations during training" in page
    assert page.count("Change since the start") >= 1


def test_training_does_not_notice_and_resume_repeats_nothing(
    tiny_sd: Path, prompts: Path, tmp_path: Path
) -> None:
    plain, whole, parts = (tmp_path / name for name in ("plain", "whole", "parts"))
    train(tiny_sd, prompts, plain, evaluation={"every_steps": 0})
    assert not (plain / "evaluations.jsonl").exists()
    train(tiny_sd, prompts, whole, evaluation={"every_steps": 1}, save_steps=2)
    assert log(whole) == log(plain)
    assert_close(weights(whole), weights(plain), atol=0, rtol=0)
    assert len({row["brightness"] for row in rows(whole)}) == 5

    # As after a kill at step 4, before its checkpoint: rows of steps 3 and 4 are there already.
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "checkpoint-4")
    train(tiny_sd, prompts, parts, evaluation={"every_steps": 1}, resume_from_checkpoint="latest")
    assert rows(parts) == rows(whole)
    assert_close(weights(parts), weights(whole), atol=0, rtol=0)

    # As after a signal in the evaluation of step 2, whose weights are saved and row is not.
    shutil.rmtree(parts / "checkpoints" / "checkpoint-4")
    lines = (whole / "evaluations.jsonl").read_text().splitlines(keepends=True)
    (parts / "evaluations.jsonl").write_text("".join(lines[:2]))
    train(tiny_sd, prompts, parts, evaluation={"every_steps": 1}, resume_from_checkpoint="latest")
    assert rows(parts) == rows(whole)


def stopping(**more: Any) -> dict[str, Any]:
    return {
        "early_stopping_metric": DARKNESS,
        "early_stopping_patience": 2,
        "every_steps": 1,
    } | more


def test_early_stopping_puts_the_best_weights_back(
    tiny_sd: Path, prompts: Path, tmp_path: Path
) -> None:
    train(tiny_sd, prompts, tmp_path, max_steps=6, evaluation=stopping())
    summary = json.loads((tmp_path / "summary.json").read_text())
    found = rows(tmp_path)
    best = max(range(len(found)), key=lambda index: found[index][DARKNESS])
    assert summary["steps"] == found[-1]["step"] == best + 2 < 6
    # Darkness falls from the start, so the best model is the base.
    assert best == 0
    assert all(not value.any() for key, value in weights(tmp_path).items() if "lora_B" in key)
    assert summary["after"]["brightness"] == summary["before"]["brightness"]
    assert "weights of step 0" in (tmp_path / "report.html").read_text()


def test_stopped_run_stays_stopped_and_a_resumed_one_stops_alike(
    tiny_sd: Path, prompts: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = stopping(early_stopping_patience=3)
    train(tiny_sd, prompts, whole, max_steps=6, evaluation=more)
    train(tiny_sd, prompts, parts, max_steps=2, evaluation=more)
    for _ in range(2):
        train(tiny_sd, prompts, parts, 6, evaluation=more, resume_from_checkpoint="latest")
        assert rows(parts) == rows(whole)
        assert log(parts) == log(whole)
        assert_close(weights(parts), weights(whole), atol=0, rtol=0)
    assert len(rows(parts)) == 4


def test_rising_metric_does_not_stop(tiny_sd: Path, prompts: Path, tmp_path: Path) -> None:
    more = stopping(early_stopping_metric="brightness")
    train(tiny_sd, prompts, tmp_path, evaluation=more)
    assert rows(tmp_path)[-1]["step"] == 4


@pytest.mark.parametrize("metric", ["saturation", "nothing"])
def test_metric_must_be_a_reward_of_the_evaluation(
    metric: str, tiny_sd: Path, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=rf"{metric} is not.*brightness, .*darkness, diversity"):
        train(tiny_sd, prompts, tmp_path, evaluation=stopping(early_stopping_metric=metric))


def test_average_is_what_is_evaluated(tiny_sd: Path, prompts: Path, tmp_path: Path) -> None:
    train(tiny_sd, prompts, tmp_path, evaluation={"curve_prompts": None}, ema_decay=0.9)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert rows(tmp_path)[-1]["brightness"] == pytest.approx(summary["after"]["brightness"])


def test_best_weights_and_count_by_hand() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    config = EvalConfig(early_stopping_metric="score", early_stopping_patience=2)
    stop = EarlyStopping(config, [weight])
    for step, score in enumerate([1.0, 2.0, 2.0]):
        weight.data.fill_(step)
        stop.update(step, {"score": score})
    assert not stop.finished
    other = EarlyStopping(config, [weight])
    other.load_state_dict(stop.state_dict())
    other.update(3, {"score": 1.9})
    assert other.finished
    other.restore_best()
    assert weight.item() == 1.0
    assert other.note(1) == []


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"every_steps": 2}, "evaluation.prompts"),
        ({"prompts": "README.md", "early_stopping_metric": "clip"}, "evaluation.every_steps"),
    ],
)
def test_options_that_need_others(options: dict[str, Any], missing: str) -> None:
    with pytest.raises(InputError, match=missing):
        check_config(DraftConfig(evaluation=EvalConfig(**options), prompts="README.md", model="x"))


def test_best_value_of_another_evaluation_is_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    old = EvalConfig(early_stopping_metric="brightness", early_stopping_patience=1)
    new = EvalConfig(early_stopping_metric="jpeg", early_stopping_patience=1)
    before = EarlyStopping(old, [weight], "a")
    before.update(1, {"brightness": 9.0})
    for config, measured in [(new, "a"), (old, "b")]:
        caplog.clear()
        after = EarlyStopping(config, [weight], measured)
        after.load_state_dict(before.state_dict())
        assert "starts anew" in caplog.text
        after.update(2, {"brightness": 1.0, "jpeg": 1.0})
        assert not after.finished
