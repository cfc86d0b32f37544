"""A sampler and a reward without models, and the pairs that are built with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.config import PairsBuildConfig, SamplingConfig
from mmalign.pipelines.pairs_build import build_pairs

PROMPTS = ["a red ball", "a blue cube", "two cats", "a dog", "nothing"]


class FakeSampler:
    """Every image is a function of its prompt and seed, as the protocol promises."""

    def __init__(self) -> None:
        self.sampled: list[tuple[str, int]] = []
        self.batches: list[int] = []
        self.stop_after: int | None = None

    def sample(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: SamplingConfig
    ) -> Tensor:
        if self.stop_after is not None and len(self.sampled) >= self.stop_after:
            raise KeyboardInterrupt
        self.sampled += zip(prompts, seeds, strict=True)
        self.batches.append(len(prompts))
        images = []
        for seed in seeds:
            level = torch.rand((), generator=torch.Generator().manual_seed(seed))
            images.append(torch.ones(3, 6, 6) * level)
        return torch.stack(images)


class Brightness:
    name = "fake-brightness"
    modality = "image"
    differentiable = True
    range = (0.0, 1.0)

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        self.batches.append(list(prompts))
        return samples.mean((1, 2, 3))


def configure(folder: Path) -> PairsBuildConfig:
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return PairsBuildConfig(
        prompts=str(folder / "prompts.txt"),
        output=str(folder / "out"),
        candidates_per_prompt=3,
        sampling=SamplingConfig(batch_size=4, seed=7),
        device="cpu",
    )


def build(config: PairsBuildConfig, adapter: Any = None, reward: Any = None) -> Any:
    adapter, reward = adapter or FakeSampler(), reward or Brightness()
    return build_pairs(config, adapter=adapter, reward=reward)


def metadata(config: PairsBuildConfig) -> list[dict[str, Any]]:
    lines = (Path(config.output) / "metadata.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
