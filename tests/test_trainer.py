"""What a step does to the weights, and what is logged and saved of it."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toy_trainer import Batch, Toy, in_child, make_config

import mmalign.checkpoint
from mmalign.accelerator import make_accelerator
from mmalign.config import TrainConfig
from mmalign.metrics_log import read_metrics
from mmalign.monitor import WINDOW
from mmalign.trainer import Trainer, TrainResult
from mmalign.types import StepOutput

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_update_equals_plain_torch(tmp_path: Path) -> None:
    """One accumulated, clipped AdamW step equals the same step written out."""
    config = make_config(
        tmp_path, max_steps=1, warmup_steps=0, ema_decay=None, max_grad_norm=0.1, weight_decay=0.1
    )
    toy, plain = Toy(config), Toy(config)
    for each in (toy, plain):
        each.module[1].p = 0.0
    result = toy.trainer.train()
    optimizer = torch.optim.AdamW(
        [p for p in plain.module.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1
    )
    batches = plain.batches(0)
    losses = []
    for _ in range(2):
        loss = plain.step(next(batches)).loss
        (loss / 2).backward()
        losses.append(loss.item())
    norm = torch.nn.utils.clip_grad_norm_(plain.module.parameters(), 0.1)
    optimizer.step()
    for ours, theirs in zip(toy.module.parameters(), plain.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert result.metrics["loss"] == pytest.approx(sum(losses) / 2)
    assert result.metrics["grad_norm"] == pytest.approx(norm.item())
    assert norm > 0.1


def test_log_lines(tmp_path: Path) -> None:
    toy = Toy(make_config(tmp_path, max_steps=5, logging_steps=2))
    toy.trainer.train()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert list(rows[0]) == ["step", "loss", "inputs", "constant", "grad_norm", "lr"]
    assert rows[0]["constant"] == 2.5
    assert rows[0]["lr"] == pytest.approx(0.05 * 1 / 2)  # second of two warm-up steps
    batches = toy.batches(1)
    inputs = [next(batches).inputs.mean() for _ in range(2)]
    assert rows[0]["inputs"] == pytest.approx(torch.stack(inputs).mean().item())


def test_only_trainable_tensors_are_saved_and_trained(tmp_path: Path) -> None:
    toy = Toy(make_config(tmp_path, max_steps=4))
    frozen = toy.module[2].bias.clone()
    toy.trainer.train()
    saved = mmalign.checkpoint.load_checkpoint(tmp_path / "checkpoints" / "checkpoint-4")
    assert sorted(saved.tensors["model"]) == ["0.bias", "0.weight", "2.weight"]
    assert torch.equal(toy.module[2].bias, frozen)


def test_average_is_applied_and_taken_back(tmp_path: Path) -> None:
    toy = Toy(make_config(tmp_path))
    toy.trainer.train()
    weight = toy.module[0].weight.clone()
    with toy.trainer.averaged_weights():
        assert not torch.equal(toy.module[0].weight, weight)
        assert toy.trainer.ema is not None
        assert torch.equal(toy.module[0].weight, toy.trainer.ema.shadow_params[0])
    assert torch.equal(toy.module[0].weight, weight)


def test_step_may_do_its_own_backward(tmp_path: Path) -> None:
    config = make_config(tmp_path / "own", max_steps=3)
    toy = Toy(config, backward=False)
    original = toy.trainer._step

    def step(batch: Batch) -> StepOutput:
        output = original(batch)
        toy.trainer._accelerator.backward(output.loss)
        return StepOutput(output.loss.detach(), output.metrics)

    toy.trainer._step = step
    result = toy.trainer.train()
    other = Toy(make_config(tmp_path / "other", max_steps=3)).trainer.train()
    assert result.metrics == other.metrics


def test_bf16_trains_with_float32_weights(tmp_path: Path) -> None:
    toy = Toy(make_config(tmp_path, mixed_precision="bf16"))
    result: TrainResult = toy.trainer.train()
    assert toy.module[0].weight.dtype == torch.float32
    assert math.isfinite(result.metrics["loss"])


def with_loss_scaling(config: TrainConfig) -> Toy:
    """A toy under fp16's loss scaling, which CPUs have as well, starting from too high a scale."""
    toy = Toy(config)
    accelerator, optimizer = toy.trainer._accelerator, toy.trainer._optimizer
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    optimizer.__init__(optimizer.optimizer, scaler=accelerator.scaler)
    return toy


def test_fp16_overflow_is_left_to_the_scaler_and_resumes(tmp_path: Path) -> None:
    whole = with_loss_scaling(make_config(tmp_path / "whole", max_steps=30))
    start = whole.module[0].weight.clone()
    seen: dict[int, Tensor] = {}
    whole.trainer._on_step = lambda step: seen.setdefault(step, whole.module[0].weight.clone())
    result = whole.trainer.train()
    assert result.skipped_steps == 0
    assert torch.equal(seen[1], start)  # overflow: no update yet
    assert not torch.equal(seen[30], start)
    config = make_config(tmp_path / "parts", max_steps=30)

    def first() -> None:
        def die(step: int) -> None:
            if step == 17:
                os.kill(os.getpid(), signal.SIGKILL)

        toy = with_loss_scaling(config)
        toy.trainer._on_step = die
        toy.trainer.train()

    assert in_child(first) == -signal.SIGKILL
    second = with_loss_scaling(config)
    assert second.trainer.train().resumed_from == 16
    assert torch.equal(second.module[0].weight, whole.module[0].weight)
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_nothing_to_train_is_an_error(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    toy = Toy(config)
    with pytest.raises(ValueError, match="no trainable parameter"):
        Trainer(
            config,
            accelerator=make_accelerator(config, cpu=True),
            module=nn.Linear(2, 2).requires_grad_(False),
            step=toy.step,
            batches=toy.batches,
        )


def test_warnings_reach_the_result(tmp_path: Path) -> None:
    toy = Toy(make_config(tmp_path, max_steps=WINDOW))
    original = toy.trainer._step
    toy.trainer._step = lambda batch: original(batch)._replace(metrics={"rewards/margin": 99.0})
    assert "saturated" in toy.trainer.train().warnings[0]
