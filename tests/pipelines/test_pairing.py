"""Options that do not go together are refused before a single candidate is scored."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmalign.config import PairsBuildConfig, RewardConfig
from mmalign.data.files import write_jsonl
from mmalign.pipelines import pairs_build
from mmalign.pipelines._pairing import scores_of_each
from mmalign.types import InputError

CALLS: list[int] = []


def count(samples: Any, prompts: Sequence[str]) -> list[float]:
    CALLS.append(len(prompts))
    return [float(number) for number in range(len(prompts))]


@pytest.fixture(params=["folder", "shards", "answers"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Two candidates of a prompt, as each of the sources that can be paired."""
    for name, level in (("a", 50), ("b", 200)):
        Image.new("RGB", (6, 6), (level, level, level)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("p")
    if request.param == "shards":
        with tarfile.open(tmp_path / "0.tar", "w") as archive:
            for name in ("a.png", "a.txt", "b.png", "b.txt"):
                archive.add(tmp_path / name, name)
        return {"images": str(tmp_path / "0.tar")}
    if request.param == "answers":
        rows = [{"prompt": "p", "response": text, "image": "a.png"} for text in "xy"]
        write_jsonl(tmp_path / "answers.jsonl", rows)
        return {"responses": str(tmp_path / "answers.jsonl")}
    write_jsonl(tmp_path / "rows.jsonl", [{"file_name": f"{n}.png", "prompt": "p"} for n in "ab"])
    return {"images": str(tmp_path), "prompts": str(tmp_path / "rows.jsonl")}


@pytest.mark.parametrize(
    ("options", "reward", "problem"),
    [
        ({"combine": "rank"}, {"normalize": "prompt_zscore"}, "is for combine sum"),
        ({"combine": "rank"}, {"weight": 0.0}, "every weight is 0"),
        ({"combine": "best"}, {}, "unknown combination 'best'"),
        ({}, {"normalize": "log"}, "unknown normalization 'log'"),
        ({"rule": "top_k", "top_k": 1}, {}, "top_k must be at least 2"),
        ({"min_gap": -1.0}, {}, "min_gap must not be negative"),
    ],
)
def test_nothing_is_scored_for_options_that_fail(
    source: dict[str, Any],
    tmp_path: Path,
    options: dict[str, Any],
    reward: dict[str, Any],
    problem: str,
) -> None:
    CALLS.clear()
    rewards = [RewardConfig(name=f"{__name__}:count", **reward)]
    where: dict[str, Any] = {"output": str(tmp_path / "out"), "device": "cpu", **source}
    with pytest.raises(InputError, match=problem):
        pairs_build.run(PairsBuildConfig(**where, rewards=rewards, **options))
    assert not CALLS
    pairs_build.run(PairsBuildConfig(**where, rewards=[RewardConfig(name=f"{__name__}:count")]))
    assert CALLS


def test_each_reward_is_turned_so_that_higher_is_better() -> None:
    rewards = {
        "good": RewardConfig(weight=0.1),
        "bad": RewardConfig(weight=-3.0),
        "without weight": RewardConfig(weight=0.0),
        "watched": RewardConfig(eval_only=True),
    }
    scores = {key: [1.0, 2.0] for key in rewards}
    assert scores_of_each(rewards, scores) == [[1.0, 2.0], [-1.0, -2.0]]
