"""From which checkpoints a run goes on, and which it refuses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from toy_trainer import Toy, make_config

from mmalign.accelerator import make_accelerator
from mmalign.trainer import Trainer
from mmalign.types import InputError

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_resume_does_not_repeat_or_skip_data(tmp_path: Path) -> None:
    first = Toy(make_config(tmp_path, max_steps=4))
    first.trainer.train()
    second = Toy(make_config(tmp_path, max_steps=8))
    result = second.trainer.train()
    assert [*first.seen, *second.seen] == [(f"pair-{i}",) for i in range(16)]
    assert (result.resumed_from, result.step) == (4, 8)
    assert second.mean.count == 16


def test_a_finished_run_resumes_to_its_weights_and_keeps_its_log(tmp_path: Path) -> None:
    first = Toy(make_config(tmp_path))
    first.trainer.train()
    log = (tmp_path / "metrics.jsonl").read_bytes()
    second = Toy(make_config(tmp_path))
    result = second.trainer.train()
    assert result.step == 12
    assert second.seen == []
    assert torch.equal(second.module[0].weight, first.module[0].weight)
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


def test_a_run_that_is_past_its_end_is_refused(tmp_path: Path) -> None:
    Toy(make_config(tmp_path, max_steps=4)).trainer.train()
    with pytest.raises(InputError, match="has 4 steps already, more than max_steps: 3"):
        Toy(make_config(tmp_path, max_steps=3)).trainer.train()


def test_a_fresh_run_does_not_mix_with_an_old_one(tmp_path: Path) -> None:
    Toy(make_config(tmp_path, max_steps=4)).trainer.train()
    log = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="checkpoints of an earlier run"):
        Toy(make_config(tmp_path, resume_from_checkpoint=None)).trainer.train()
    assert (tmp_path / "metrics.jsonl").read_bytes() == log


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "seed was 3, now 4"),
        ({"gradient_accumulation_steps": 1}, r"samples per step \(.*\) was 8, now 4"),
        ({"ema_decay": None}, "ema was True, now False"),
    ],
)
def test_checkpoint_of_another_run_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    Toy(make_config(tmp_path, max_steps=4)).trainer.train()
    with pytest.raises(InputError, match=message):
        Toy(make_config(tmp_path, **change)).trainer.train()


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    Toy(make_config(tmp_path, max_steps=4)).trainer.train()
    config = make_config(tmp_path)
    toy = Toy(config)
    other = nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 3))
    trainer = Trainer(
        config,
        accelerator=make_accelerator(config, cpu=True),
        module=other,
        step=toy.step,
        batches=toy.batches,
        state={"mean": toy.mean},
    )
    with pytest.raises(InputError, match=r"0\.weight was \[8, 3\], now \[9, 3\]"):
        trainer.train()


@pytest.mark.parametrize(
    "forgery",
    [
        lambda state: {"run": state["run"]},
        lambda state: {**state, "training": "text"},
        lambda state: {**state, "training": {"tensor": "nowhere"}},
        lambda state: {**state, "training": {"dict": [["parts", {"dict": []}]]}},
    ],
    ids=["no training", "text", "unknown tensor", "no optimizer"],
)
def test_state_that_no_run_wrote_is_refused(tmp_path: Path, forgery: Any) -> None:
    """Its manifest fits, so it is not damaged: somebody else made it."""
    Toy(make_config(tmp_path, max_steps=4)).trainer.train()
    path = tmp_path / "checkpoints" / "checkpoint-4"
    data = json.dumps(forgery(json.loads((path / "state.json").read_text()))).encode()
    (path / "state.json").write_bytes(data)
    manifest = json.loads((path / "manifest.json").read_text())
    digest = hashlib.sha256(data).hexdigest()
    manifest["files"]["state.json"] = {"bytes": len(data), "sha256": digest}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="its contents are not those of a run"):
        Toy(make_config(tmp_path)).trainer.train()


def test_an_older_checkpoint_is_not_continued_under_newer_ones(tmp_path: Path) -> None:
    Toy(make_config(tmp_path, max_steps=8)).trainer.train()
    older = tmp_path / "checkpoints" / "checkpoint-4"
    with pytest.raises(InputError, match="checkpoint-8: is newer"):
        Toy(make_config(tmp_path, resume_from_checkpoint=str(older))).trainer.train()
    elsewhere = tmp_path / "elsewhere"
    result = Toy(make_config(elsewhere, resume_from_checkpoint=str(older))).trainer.train()
    assert (result.resumed_from, result.step) == (4, 12)


def test_changed_learning_rate_takes_effect_on_resume(tmp_path: Path) -> None:
    flat = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0}
    Toy(make_config(tmp_path, max_steps=4, **flat)).trainer.train()
    result = Toy(make_config(tmp_path, max_steps=5, learning_rate=0.5, **flat)).trainer.train()
    assert result.metrics["lr"] == 0.5
