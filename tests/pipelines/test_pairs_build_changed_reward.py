"""Scores that a run finds in its folder are those of the same reward, or are computed again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmalign.config import PairsBuildConfig, RewardConfig
from mmalign.data.files import write_jsonl
from mmalign.pipelines import pairs_build

CODE = """
from pathlib import Path

CALLS = []

def rate(images, prompts, weights):
    CALLS.append(len(images))
    return {sign} * float(Path(weights).read_text()) * images.mean((1, 2, 3))
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PairsBuildConfig:
    """Three pictures of one prompt, and a reward in a module with a file of weights."""
    monkeypatch.syspath_prepend(str(tmp_path))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for level in (50, 100, 200):
        Image.new("RGB", (6, 6), (level, level, level)).save(pictures / f"{level:03d}.png")
    rows = [{"file_name": file.name, "prompt": "p"} for file in pictures.iterdir()]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "weights.txt").write_text("1.0")
    weights = {"weights": str(tmp_path / "weights.txt")}
    return PairsBuildConfig(
        images=str(pictures),
        prompts=str(tmp_path / "rows.jsonl"),
        output=str(tmp_path / "out"),
        rewards=[RewardConfig(name="rater_of_a_test:rate", options=weights)],
        device="cpu",
    )


def build(config: PairsBuildConfig, sign: int = 1) -> tuple[int, float]:
    """Write the reward's module anew and run; returns calls and the score of the brightest."""
    (Path(config.output).parent / "rater_of_a_test.py").write_text(CODE.format(sign=sign))
    sys.modules.pop("rater_of_a_test", None)
    pairs_build.run(config)
    lines = (Path(config.output) / "scores.jsonl").read_text().splitlines()
    scores = {row["file_name"]: row["score"] for row in map(json.loads, lines)}
    return len(sys.modules["rater_of_a_test"].CALLS), scores["200.png"]


@pytest.mark.parametrize("cached", [False, True])
def test_a_changed_reward_scores_again(
    config: PairsBuildConfig, tmp_path: Path, cached: bool
) -> None:
    config.cache = str(tmp_path / "cache") if cached else None
    bright = pytest.approx(200 / 255)
    assert build(config) == (1, bright)
    assert build(config) == (0, bright)
    assert build(config, sign=-1) == (1, pytest.approx(-200 / 255))
    (tmp_path / "weights.txt").write_text("0.5")
    assert build(config, sign=-1) == (1, pytest.approx(-100 / 255))
    assert build(config, sign=-1) == (0, pytest.approx(-100 / 255))
    (tmp_path / "weights.txt").write_text("1.0")
    assert build(config) == (0, bright)  # its scores are still in the log


def test_options_of_rules_need_no_new_scores(config: PairsBuildConfig) -> None:
    build(config)
    changed: dict[str, Any] = {"rule": "all_pairs", "min_gap": 0.25, "combine": "zscore"}
    for name, value in changed.items():
        setattr(config, name, value)
        assert build(config)[0] == 0
