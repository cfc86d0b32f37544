from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.adapters import load_adapter
from mmalign.config import (
    DraftConfig,
    EvalConfig,
    LoraConfig,
    ModelConfig,
    ReferenceConfig,
    RewardConfig,
    SamplingConfig,
)
from mmalign.lora import attach_lora
from mmalign.pipelines import _kl, draft
from mmalign.pipelines._kl import base_of, kl_to_base
from mmalign.reference import make_reference

SAMPLING = SamplingConfig(num_inference_steps=3, guidance_scale=2.0, batch_size=6)


def untrained(model: Path) -> tuple[Any, Any]:
    adapter: Any = load_adapter(ModelConfig(model=str(model)), device="cpu")
    attach_lora(adapter.denoiser, LoraConfig(rank=2), seed=0)
    return adapter, make_reference(adapter, LoraConfig(rank=2), ReferenceConfig())


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl", "tiny_lcm"])
def test_zero_before_training_and_positive_after(
    model: str, request: pytest.FixtureRequest
) -> None:
    adapter, base = untrained(request.getfixturevalue(model))
    assert kl_to_base(adapter, base, ["red", "a red"], SAMPLING) == 0
    with torch.no_grad():
        for name, value in adapter.denoiser.named_parameters():
            if "lora_B" in name:
                value.add_(0.01)
    near = kl_to_base(adapter, base, ["red", "a red"], SAMPLING)
    assert near > 0
    assert not any(p.grad is not None for p in adapter.denoiser.parameters())
    # However rows are batched: the noise belongs to the row.
    other = SamplingConfig(num_inference_steps=3, guidance_scale=2.0, batch_size=16)
    assert kl_to_base(adapter, base, ["red", "a red"], other) == pytest.approx(near, rel=1e-4)


def test_value_is_the_sum_of_gaussian_divergences(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the policy's mean moved by half a standard deviation, each step adds 1/8 nat."""
    adapter, base = untrained(tiny_sd)
    active = []
    monkeypatch.setattr(base, "active", lambda: _Flag(active))
    real = adapter.transition

    def moved(*args: Any, **kwargs: Any) -> Any:
        move = real(*args, **kwargs)
        shift = 0.0 if active else 0.5
        return move._replace(mean=move.mean + shift * move.std.view(-1, 1, 1, 1))

    monkeypatch.setattr(adapter, "transition", moved)
    monkeypatch.setattr(_kl, "TRAJECTORIES", 2)
    assert kl_to_base(adapter, base, ["red"], SAMPLING) == pytest.approx(3 / 8, rel=1e-3)


class _Flag:
    def __init__(self, active: list[bool]) -> None:
        self._active = active

    def __enter__(self) -> None:
        self._active.append(True)

    def __exit__(self, *_: object) -> None:
        self._active.pop()


@pytest.mark.parametrize("update", ["never", "copy"])
def test_run_reports_it_against_the_base_and_not_a_moved_reference(
    update: Any, tiny_sd: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red\na red\n")
    draft.run(
        DraftConfig(
            model=str(tiny_sd),
            output_dir=str(tmp_path / "run"),
            device="cpu",
            prompts=str(prompts),
            rewards=[RewardConfig(name="brightness")],
            lora=LoraConfig(rank=2),
            sampling=SAMPLING,
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            reference_update=update,
            reference_update_steps=1,
            evaluation=EvalConfig(prompts=str(prompts), images_per_prompt=1),
        )
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "kl" not in summary["before"]
    assert summary["after"]["kl"] > 0


def test_moved_reference_of_full_fine_tuning_is_not_the_base() -> None:
    config = DraftConfig(lora=LoraConfig(enabled=False), reference_update="ema")
    assert base_of(config, None, object()) is None  # type: ignore[arg-type]
