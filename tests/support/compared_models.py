"""Models and folders of pictures whose brightness is known, and what a comparison of them wrote."""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from torch import Tensor

from mmalign.config import (
    EvalConfig,
    EvaluateImageConfig,
    ModelConfig,
    RewardConfig,
    SamplingConfig,
    SubjectConfig,
)
from mmalign.data.files import write_jsonl
from mmalign.pipelines import _subject_images

PROMPTS = ["a red circle", "<b>two</b> blue squares"]


class FakeAdapter:
    """Noise by seed; an adapter makes it brighter by its scale."""

    loaded: ClassVar[list[weakref.ref[FakeAdapter]]] = []
    sampled: ClassVar[list[str]] = []

    def __init__(self, config: ModelConfig) -> None:
        assert not any(one() for one in self.loaded), "two models in memory"
        self.loaded.append(weakref.ref(self))
        self.me = self  # as real ones, it goes only when cycles are collected
        self.gain = 0.2 * config.adapter_scale if config.adapter == "bright" else 0.0

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: SamplingConfig
    ) -> Tensor:
        self.sampled.extend(prompts)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = [torch.rand(3, 8, 8, generator=generator) for generator in generators]
        return torch.stack(noise) * 0.5 + self.gain


def paint(folder: Path, pictures: Sequence[tuple[str, tuple[int, int, int]]]) -> Path:
    folder.mkdir()
    rows = []
    for number, (prompt, color) in enumerate(pictures):
        Image.new("RGB", (6 + 2 * number, 8), color).save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "prompt": prompt})
    write_jsonl(folder / "metadata.jsonl", rows)
    return folder


def read(config: EvaluateImageConfig, name: str) -> Any:
    return json.loads((Path(config.output_dir) / name).read_text(encoding="utf-8"))


def win_rates(config: EvaluateImageConfig, judge: str) -> dict[tuple[str, str], Any]:
    found = read(config, "results.json")["win_rates"]
    return {(row["subject"], row["against"]): row for row in found if row["judge"] == judge}


def configure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> EvaluateImageConfig:
    def load(config: ModelConfig, *, device: str, for_training: bool) -> FakeAdapter:
        assert not for_training
        return FakeAdapter(config)

    monkeypatch.setattr(_subject_images, "load_adapter", load)
    monkeypatch.setattr(FakeAdapter, "loaded", [])
    monkeypatch.setattr(FakeAdapter, "sampled", [])
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return EvaluateImageConfig(
        adapter="bright",
        device="cpu",
        output_dir=str(folder / "run"),
        sampling=SamplingConfig(seed=3, batch_size=3),
        evaluation=EvalConfig(
            prompts=str(folder / "prompts.txt"),
            images_per_prompt=2,
            rewards=[RewardConfig(name="saturation")],
            judge=RewardConfig(name="brightness"),
        ),
    )


def list_several(folder: Path) -> list[SubjectConfig]:
    paint(folder / "dark", [(prompt, (10, 5, 5)) for prompt in PROMPTS for _ in range(2)])
    return [
        SubjectConfig(name="base"),
        SubjectConfig(name="<i>weak</i>", adapter="bright", adapter_scale=0.5),
        SubjectConfig(name="strong", adapter="bright"),
        SubjectConfig(name="dark", images=str(folder / "dark")),
    ]
