"""Rounds of Diffusion-DPO on the policy's own pairs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmalign.config import (
    CandidatesConfig,
    CurriculumConfig,
    EvalConfig,
    LoraConfig,
    OnlineDpoConfig,
    PairsConfig,
    RewardConfig,
    SamplingConfig,
)
from mmalign.pipelines import diffusion_dpo, online_dpo
from mmalign.types import InputError

BRIGHTNESS = RewardConfig(name="brightness")
SAMPLING = SamplingConfig(num_inference_steps=2, guidance_scale=2.0)


@pytest.fixture
def config(tiny_sd: Path, tmp_path: Path) -> OnlineDpoConfig:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red\na red\nred red\n")
    return OnlineDpoConfig(
        model=str(tiny_sd),
        output_dir=str(tmp_path / "run"),
        device="cpu",
        offline=True,
        rounds=2,
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        beta=10.0,
        lora=LoraConfig(rank=2),
        curriculum=CurriculumConfig(num_buckets=2, stage_steps=1),
        pairs=PairsConfig(resolution=32),
        candidates=CandidatesConfig(
            prompts=str(prompts),
            candidates_per_prompt=3,
            rule="all_pairs",
            rewards=[BRIGHTNESS],
            sampling=SAMPLING,
        ),
        sampling=SAMPLING,
        evaluation=EvalConfig(prompts=str(prompts), images_per_prompt=2, rewards=[BRIGHTNESS]),
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def candidates(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(folder.glob("pairs/candidates/*/*.png"))]


def test_the_second_round_goes_on_from_the_first(config: OnlineDpoConfig) -> None:
    online_dpo.run(config)
    output = Path(config.output_dir)
    first, last = lines(output / "round-1"), lines(output)
    assert first[0]["margin"] == 0
    assert last[0]["margin"] != 0  # the policy has left the base already
    assert [line["stage"] for line in last] == [0, 1, 1]
    one, two = weights(output / "round-1"), weights(output)
    assert one.keys() == two.keys()
    assert any(not torch.equal(one[name], two[name]) for name in one)
    assert len(candidates(output)) == 9
    assert not set(candidates(output)) & set(candidates(output / "round-1"))
    settings = json.loads((output / "pairs/candidates/settings.json").read_text())
    assert settings["adapter"] == str(output / "round-1" / "adapter")
    summary = json.loads((output / "summary.json").read_text())
    assert summary["method"] == "online-dpo"
    assert summary["before"].keys() >= {"brightness", "diversity"}
    assert summary["after"].keys() == {*summary["before"], "kl"}


@pytest.mark.parametrize("killed_in", ["pairs of round 1", "round 1", "pairs of round 2"])
def test_interrupted_rounds_go_on(
    config: OnlineDpoConfig, killed_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online_dpo.run(config)
    again = replace(config, output_dir=str(tmp_path / "again"))
    wanted = 2 if "2" in killed_in else 1
    part = "build_pairs" if "pairs" in killed_in else "train"
    calls = {"build_pairs": 0, "train": 0}

    def stopping(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            result = function(*args, **kwargs)
            if (name, calls[name]) == (part, wanted):
                raise KeyboardInterrupt
            return result

        return call

    with monkeypatch.context() as patch:
        patch.setattr(online_dpo, "build_pairs", stopping("build_pairs", online_dpo.build_pairs))
        patch.setattr(diffusion_dpo, "run", stopping("train", diffusion_dpo.run))
        with pytest.raises(KeyboardInterrupt):
            online_dpo.run(again)
    with pytest.raises(InputError, match="holds an earlier run; continue it with"):
        online_dpo.run(again)
    online_dpo.run(replace(again, resume_from_checkpoint="latest"))
    whole, parts = Path(config.output_dir), Path(again.output_dir)
    assert lines(parts) == lines(whole)
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(parts)[name], tensor)


@pytest.fixture
def one_done(config: OnlineDpoConfig, monkeypatch: pytest.MonkeyPatch) -> OnlineDpoConfig:
    """Options that continue a run killed after its first round."""
    make = online_dpo.build_pairs

    def once(build: Any) -> Any:
        if "round-1" not in build.output:
            raise KeyboardInterrupt
        return make(build)

    with monkeypatch.context() as patch:
        patch.setattr(online_dpo, "build_pairs", once)
        with pytest.raises(KeyboardInterrupt):
            online_dpo.run(config)
    return replace(config, resume_from_checkpoint="latest")


def test_finished_rounds_are_held_to_the_rules_of_a_resumed_run(
    one_done: OnlineDpoConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refused = {
        "seed was 0, now 7": {"seed": 7},
        "samples per step .* was 2, now 4": {"gradient_accumulation_steps": 2},
        "has 3 steps already, more than max_steps: 2": {"max_steps": 2},
    }
    for match, change in refused.items():
        with pytest.raises(InputError, match=rf"round-1.checkpoints.checkpoint-3: .*{match}"):
            online_dpo.run(replace(one_done, **change))

    def stop(build: Any) -> None:
        raise KeyboardInterrupt

    def said(**change: Any) -> list[str]:
        caplog.clear()
        with pytest.raises(KeyboardInterrupt):
            online_dpo.run(replace(one_done, **change))
        return [r.getMessage() for r in caplog.records if "had other options" in r.getMessage()]

    monkeypatch.setattr(online_dpo, "build_pairs", stop)
    assert said() == []
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    assert said(rounds=3, evaluation=EvalConfig(), **split) == []
    jpeg = replace(one_done.candidates, rewards=[RewardConfig(name="jpeg")])
    (line,) = said(beta=5000.0, candidates=jpeg, max_steps=4)
    assert line.startswith(f"{Path(one_done.output_dir) / 'round-1'} is kept and had")
    assert "beta: 10.0 -> 5000.0" in line
    assert "max_steps: 3 -> 4" in line
    assert "candidates.rewards: " in line
    assert "jpeg" in line


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"lora": LoraConfig(enabled=False)}, r"lora\.enabled"),
        ({"adapter": "somewhere"}, r"lora\.init_from"),
        ({"resume_from_checkpoint": "checkpoint-3"}, "`latest` only"),
        ({"evaluation": EvalConfig(judge=BRIGHTNESS)}, "brightness is trained on"),
    ],
    ids=["full fine-tuning", "adapter", "resume", "judge"],
)
def test_unusable_options(config: OnlineDpoConfig, change: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        online_dpo.run(replace(config, **change))
