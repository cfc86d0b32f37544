"""`evaluate image` with little memory: the batch is halved once for the whole command."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmalign import cli
from mmalign.data.files import write_jsonl
from mmalign.data.images import save_png
from mmalign.pipelines import _subject_scores

sizes: list[int] = []


def hungry(images: Tensor, prompts: Sequence[str]) -> Tensor:
    sizes.append(len(images))
    if len(images) > 2:
        raise MemoryError
    return images.mean((1, 2, 3))


def test_the_smaller_batch_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_subject_scores, "BATCH", 4)
    sizes.clear()
    for index in range(8):
        save_png(torch.full((3, 8, 8), index / 8), tmp_path / "pictures" / f"{index}.png")
    rows = [{"file_name": f"{index}.png", "prompt": f"p{index}"} for index in range(8)]
    write_jsonl(tmp_path / "pictures" / "metadata.jsonl", rows)
    rewards = json.dumps([{"name": f"{__name__}:hungry", "batch_size": 4}])
    arguments = ["evaluate", "image", "--evaluation.rewards", rewards]
    arguments += ["--compare", *(f"{name}={tmp_path / 'pictures'}" for name in "abc")]
    with caplog.at_level(logging.WARNING):
        assert cli.main([*arguments, "--output_dir", str(tmp_path / "run")]) == 0
    assert sizes == [4] + [2] * 12
    assert caplog.text.count("out of memory") == 1
