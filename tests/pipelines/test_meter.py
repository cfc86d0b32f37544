"""What training costs, against counts by hand."""

from __future__ import annotations

import itertools
import json
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.checkpoint import checkpoint

from mmalign.config import (
    D3poConfig,
    DiffusionDpoConfig,
    DraftConfig,
    EvalConfig,
    LoraConfig,
    PairsConfig,
    RewardConfig,
    SamplingConfig,
)
from mmalign.data.writers import write_pairs
from mmalign.pipelines import d3po, diffusion_dpo, draft
from mmalign.pipelines._meter import CostMeter
from mmalign.types import ImageRef, PreferencePair

PROMPTS, SAMPLER_STEPS, GUIDED = 2, 4, 2


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("red\na red\nred red\n")
    return file


def online(model: Path, prompts: Path, output: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "output_dir": str(output),
        "device": "cpu",
        "offline": True,
        "prompts": str(prompts),
        "rewards": [RewardConfig(name="brightness")],
        "lora": LoraConfig(rank=2),
        "sampling": SamplingConfig(num_inference_steps=SAMPLER_STEPS, guidance_scale=2.0),
        "max_steps": 2,
        "per_device_train_batch_size": PROMPTS,
        **more,
    }


def cost(output: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((output / "summary.json").read_text())["cost"]
    return found


def test_d3po(tiny_sd: Path, prompts: Path, tmp_path: Path) -> None:
    evaluation = EvalConfig(
        prompts=str(prompts), images_per_prompt=1, rewards=[RewardConfig(name="brightness")]
    )
    d3po.run(D3poConfig(**online(tiny_sd, prompts, tmp_path, evaluation=evaluation)))
    sampled = PROMPTS * 2 * SAMPLER_STEPS * GUIDED
    trained = PROMPTS * 2 * SAMPLER_STEPS * GUIDED  # chosen and rejected, at every step
    found = cost(tmp_path)
    assert found.pop("train_seconds") > 0
    assert found == {  # of two steps; the evaluation's images do not count
        "unet_forwards": 2 * (sampled + 2 * trained),  # policy and reference
        "unet_backwards": 2 * trained,
        "reward_queries": 2 * PROMPTS * 2,
    }


def test_draft_1(tiny_sd: Path, prompts: Path, tmp_path: Path) -> None:
    draft.run(DraftConfig(**online(tiny_sd, prompts, tmp_path, backprop_steps=1)))
    one = PROMPTS * GUIDED
    found = cost(tmp_path)
    assert found.pop("train_seconds") > 0
    assert found == {
        "unet_forwards": 2 * (SAMPLER_STEPS * one + one),  # the last step is computed again
        "unet_backwards": 2 * one,
        "reward_queries": 2 * PROMPTS,
    }


@pytest.mark.parametrize(
    ("more", "forwards"),
    [
        ({}, 8),  # two pairs are four images, by policy and reference
        ({"lora": LoraConfig(enabled=False)}, 8),  # the reference is a network of its own
        ({"gradient_checkpointing": True}, 12),
        ({"split_pair_backward": True}, 8),
    ],
)
def test_diffusion_dpo(more: dict[str, Any], forwards: int, tiny_sd: Path, tmp_path: Path) -> None:
    pairs = {color: ImageRef(picture(color), color) for color in ("red", "green", "blue")}
    rows = [
        PreferencePair(pair_id=color, prompt="red", chosen=pairs["red"], rejected=pairs[color])
        for color in ("green", "blue")
    ]
    write_pairs(rows, tmp_path / "pairs", "imagefolder")
    options: dict[str, Any] = {
        "model": str(tiny_sd),
        "output_dir": str(tmp_path / "run"),
        "device": "cpu",
        "offline": True,
        "pairs": PairsConfig(path=str(tmp_path / "pairs"), resolution=16),
        "lora": LoraConfig(rank=2),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        **more,
    }
    diffusion_dpo.run(DiffusionDpoConfig(**options))
    found = cost(tmp_path / "run")
    assert found.pop("train_seconds") > 0
    assert found == {"unet_forwards": 2 * forwards, "unet_backwards": 2 * 4, "reward_queries": 0}


def picture(color: str) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (16, 16), color).save(buffer, "PNG")
    return buffer.getvalue()


def test_resumed_run_reports_the_same(
    tiny_sd: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    draft.run(DraftConfig(**online(tiny_sd, prompts, whole)))
    tick_by(1000, monkeypatch)
    draft.run(DraftConfig(**online(tiny_sd, prompts, parts, max_steps=1)))
    before = cost(parts)
    tick_by(1, monkeypatch)
    draft.run(DraftConfig(**online(tiny_sd, prompts, parts, resume_from_checkpoint="latest")))
    expected, found = cost(whole), cost(parts)
    first, second = divmod(found.pop("train_seconds"), 1000)
    # The checkpoint does not know how long its own writing took: less than the run that wrote it.
    assert 0 < first < before["train_seconds"] / 1000
    assert second > 0
    del expected["train_seconds"]
    assert found == expected


def tick_by(seconds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the meter's clock go on by so much whenever it is read."""
    clock = SimpleNamespace(monotonic=itertools.count(0, seconds).__next__)
    monkeypatch.setattr("mmalign.pipelines._meter.time", clock)


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 3)

    def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.layer(sample),)


def test_meter_counts_only_while_it_runs() -> None:
    meter, tiny = CostMeter(), Tiny()
    meter.watch(tiny)
    meter.watch(tiny)
    reward = meter.counted(lambda images, prompts, names: images.sum(1))
    rows = torch.ones(5, 3)

    def use() -> None:
        tiny(rows)[0].sum().backward()
        reward(rows, ["a"] * 5)

    use()
    with meter.running():
        use()
        with meter.paused():
            use()
        with torch.no_grad():
            tiny(rows)
    use()
    assert meter.counts() == {"unet_forwards": 10, "unet_backwards": 5, "reward_queries": 5}
    seconds = meter.train_seconds
    assert seconds > 0
    assert meter.train_seconds == seconds


def test_recomputed_forward_counts_again() -> None:
    meter, tiny = CostMeter(), Tiny()
    meter.watch(tiny)
    with meter.running():
        value = checkpoint(lambda x: tiny(x)[0], torch.ones(5, 3), use_reentrant=False)
        value.sum().backward()
    assert meter.counts() == {"unet_forwards": 10, "unet_backwards": 5, "reward_queries": 0}
