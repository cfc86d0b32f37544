"""Pairs by several rewards: weights, Pareto fronts, GDPO, and rewards that rank nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_candidates import Brightness, FakeSampler, metadata
from PIL import Image
from torch import Tensor

from mmalign.config import PairsBuildConfig, RewardConfig
from mmalign.data.schema import CHOSEN_FILE, REJECTED_FILE
from mmalign.pipelines import pairs_build
from mmalign.pipelines.pairs_build import build_pairs
from mmalign.types import InputError


def test_rewards_of_the_configuration(
    building: PairsBuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    class Negative(Brightness):
        def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
            return -super().__call__(samples, prompts)

    def load(reward: RewardConfig, device: str) -> Brightness:
        loaded.append(reward.name)
        return Negative() if reward.name == "dark" else Brightness()

    monkeypatch.setattr(pairs_build, "load_reward", load)
    building.rewards = [
        RewardConfig(name="bright", weight=1.0),
        RewardConfig(name="dark", weight=3.0, options={"x": 1}),
        RewardConfig(name="judge", eval_only=True),
    ]
    build_pairs(building, adapter=FakeSampler())  # type: ignore[arg-type]
    assert loaded == ["bright", "dark", "judge"]
    row = metadata(building)[0]
    chosen, rejected = (
        Image.open(Path(building.output) / row[key]).getpixel((0, 0))[0]  # type: ignore[index]
        for key in (CHOSEN_FILE, REJECTED_FILE)
    )
    assert chosen < rejected
    assert row["score_chosen"] == pytest.approx(chosen / 255 * (1 - 3), abs=1e-5)
    log = Path(building.output) / "scores" / "00000-of-00001.jsonl"
    before = log.read_bytes()
    building.rewards[1].weight = 0.5  # other weights need no new scores
    build_pairs(building, adapter=FakeSampler())  # type: ignore[arg-type]
    assert log.read_bytes() == before
    assert metadata(building)[0][CHOSEN_FILE] == row[REJECTED_FILE]
    building.rewards = building.rewards[2:]
    with pytest.raises(InputError, match="rewards is empty"):
        build_pairs(building, adapter=FakeSampler())  # type: ignore[arg-type]


def by_hand(images: Tensor, prompts: Sequence[str], channel: int = 0) -> Tensor:
    """Score by one channel of the first pixel."""
    return images[:, channel, 0, 0]


def channel(number: int, **more: Any) -> RewardConfig:
    return RewardConfig(name=f"{__name__}:by_hand", options={"channel": number}, **more)


@pytest.fixture
def colors(building: PairsBuildConfig, tmp_path: Path) -> PairsBuildConfig:
    """Three pictures of one prompt whose red, green and blue disagree."""
    rows = {"a": (200, 50, 0), "b": (100, 50, 255), "c": (150, 20, 100)}
    for name, color in rows.items():
        Image.new("RGB", (6, 6), color).save(tmp_path / f"{name}.png")
    table = [json.dumps({"file_name": f"{name}.png", "prompt": "p"}) for name in rows]
    (tmp_path / "table.jsonl").write_text("\n".join(table))
    building.images, building.prompts = str(tmp_path), str(tmp_path / "table.jsonl")
    return building


def chosen(building: PairsBuildConfig) -> set[tuple[str, str]]:
    """Name the pairs by the red of their sides."""
    names = {200: "a", 100: "b", 150: "c"}
    found = set()
    for row in metadata(building):
        sides = [
            Image.open(Path(building.output) / row[key]) for key in (CHOSEN_FILE, REJECTED_FILE)
        ]
        found.add(tuple(names[int(side.convert("RGB").getpixel((0, 0))[0])] for side in sides))
    return found


def test_pareto_pairs(colors: PairsBuildConfig) -> None:
    colors.rewards, colors.rule = [channel(0), channel(1)], "pareto"
    build_pairs(colors)
    assert chosen(colors) == {("a", "b"), ("a", "c")}


def test_pareto_turns_rewards_of_negative_weight(colors: PairsBuildConfig) -> None:
    colors.rewards, colors.rule = [channel(0), channel(1, weight=-1.0)], "pareto"
    build_pairs(colors)
    assert chosen(colors) == {("a", "b"), ("c", "b")}


def test_eval_only_rewards_are_written_down_but_choose_nothing(colors: PairsBuildConfig) -> None:
    colors.rewards = [channel(0), channel(2, eval_only=True, weight=100.0)]
    build_pairs(colors)
    assert chosen(colors) == {("a", "b")}
    lines = (Path(colors.output) / "scores.jsonl").read_text().splitlines()
    scores = {row["file_name"]: row for row in map(json.loads, lines)}
    (blue,) = [
        key for key in scores["b.png"] if key.startswith(__name__) and scores["b.png"][key] == 1.0
    ]
    assert scores["b.png"]["score"] == pytest.approx(100 / 255)
    assert scores["a.png"][blue] == 0.0
    (Path(colors.output) / "metadata.jsonl").unlink()
    colors.rule = "pareto"
    build_pairs(colors)
    assert chosen(colors) == {("a", "b"), ("a", "c"), ("c", "b")}


def test_only_eval_only_rewards_rank_nothing(colors: PairsBuildConfig) -> None:
    colors.rewards = [channel(0, eval_only=True)]
    with pytest.raises(InputError, match="at least one reward must rank"):
        build_pairs(colors)


def test_gdpo_ranks_within_prompts_and_spreads_over_all(colors: PairsBuildConfig) -> None:
    colors.rewards, colors.combine = [channel(0), channel(2, weight=0.1)], "gdpo"
    build_pairs(colors)
    lines = (Path(colors.output) / "scores.jsonl").read_text().splitlines()
    scores = torch.tensor([json.loads(line)["score"] for line in lines])
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(scores.std(correction=0)) == pytest.approx(1.0, abs=1e-6)
