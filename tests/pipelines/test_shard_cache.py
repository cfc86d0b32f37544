"""Scores of shards that other runs find in a cache, of one shard at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tars import plain, write_tar
from torch import Tensor

from mmalign.config import PairsBuildConfig, RewardConfig, ScoreConfig
from mmalign.pipelines import _shard_rewards, pairs_build, score
from mmalign.types import InputError

ROWS = 6
SCORED: list[int] = []
FAILS = [10**9]


def counted(images: Tensor, prompts: Sequence[str]) -> Tensor:
    if sum(SCORED) >= FAILS[0]:
        raise ValueError("enough")
    SCORED.append(len(images))
    return images.mean((1, 2, 3))


NAME = f"{__name__}:counted"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of a prompt each, with six different pictures."""
    SCORED.clear()
    FAILS[0] = 10**9
    for number in range(2):
        members = []
        for row in range(ROWS):
            picture = plain((40 * row + number, 7, 9))
            members += [(f"{row}.png", picture), (f"{row}.txt", b"p")]
        write_tar(tmp_path / "shards" / f"{number}.tar", members)
    return tmp_path / "shards"


def scores(shards: Path, output: Path, **options: Any) -> list[float]:
    options = {"reward": [NAME], "batch_size": 2, **options}
    score.run(ScoreConfig(images=str(shards), output=str(output), **options))
    files = sorted(output.glob("*.parquet"))
    return [value for file in files for value in pq.read_table(file).columns[-1].to_pylist()]


def test_runs_over_the_same_shards_share_their_scores(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    truth = scores(shards, tmp_path / "plain")
    assert "from the cache" not in capsys.readouterr().out
    assert scores(shards, tmp_path / "first", cache=str(cache)) == truth
    assert sum(SCORED) == 4 * ROWS
    assert "12 images scored, 0 skipped, 0 scores from the cache" in capsys.readouterr().out
    assert scores(shards, tmp_path / "second", cache=str(cache), batch_size=32) == truth
    assert "12 scores from the cache" in capsys.readouterr().out
    where: dict[str, Any] = {"images": str(shards), "device": "cpu", "cache": str(cache)}
    rewards = [RewardConfig(name=NAME)]
    pairs_build.run(PairsBuildConfig(**where, output=str(tmp_path / "pairs"), rewards=rewards))
    assert ", 12 scores from the cache; 0 prompts" in capsys.readouterr().out
    for shard in range(2):
        share = {"num_shards": 2, "shard": shard, "output": str(tmp_path / "two")}
        pairs_build.run(PairsBuildConfig(**where, **share, rewards=rewards))
        assert ", 6 scores from the cache" in capsys.readouterr().out
    assert sum(SCORED) == 4 * ROWS
    for file in (tmp_path / "pairs").glob("*.tar"):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_a_cache_is_of_one_shard_at_a_time(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a process holds in memory is what the cache of the shard in hand has."""
    held: list[int] = []

    class Watched(_shard_rewards.ScoreCache):
        def save(self) -> None:
            super().save()
            held.append(len(self._known))

    monkeypatch.setattr(_shard_rewards, "ScoreCache", Watched)
    scores(shards, tmp_path / "out", cache=str(tmp_path / "cache"))
    assert held == [ROWS, ROWS]
    known = [json.loads(file.read_text()) for file in (tmp_path / "cache").glob("*/reward.json")]
    assert len({one["shard"] for one in known}) == 2
    assert all(len(list(file.glob("*.parquet"))) == 1 for file in (tmp_path / "cache").iterdir())


def test_scores_of_a_shard_that_fails_are_kept(shards: Path, tmp_path: Path) -> None:
    FAILS[0] = 4
    with pytest.raises(InputError, match="enough"):
        scores(shards, tmp_path / "out", cache=str(tmp_path / "cache"))
    FAILS[0] = 10**9
    scores(shards, tmp_path / "out", cache=str(tmp_path / "cache"))
    assert sum(SCORED) == 2 * ROWS


class Fickle:
    """Never says the same twice."""

    name = "counted"
    modality = "image"
    differentiable = False
    range = (0.0, 1.0)
    fingerprint = None

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return counted(images, prompts)


def test_scores_that_may_not_be_kept_are_not(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    for number in range(2):
        output = tmp_path / str(number)
        scores(shards, output, reward=[f"{__name__}:Fickle"], cache=str(cache))
        printed = capsys.readouterr().out
        assert printed.count("its scores are not cached") == 1
        assert "from the cache" not in printed
    assert sum(SCORED) == 4 * ROWS
    assert not cache.exists()
