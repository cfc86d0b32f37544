"""Which pairs `mmalign pairs build` makes of the pictures of a prompt, and what it reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_candidates import PROMPTS, Brightness, FakeSampler, build, metadata
from PIL import Image
from torch import Tensor

from mmalign.config import PairsBuildConfig
from mmalign.data.schema import CHOSEN_FILE, REJECTED_FILE
from mmalign.pipelines import pairs_build
from mmalign.randomness import derive_seed
from mmalign.types import InputError


def test_best_and_worst_of_each_prompt(building: PairsBuildConfig) -> None:
    adapter = FakeSampler()
    table = build(building, adapter)
    assert [pair.prompt for pair in table.pairs] == PROMPTS
    assert (table.ties, table.bad_rows) == (0, [])
    expected = [(p, derive_seed(7, p, i)) for p in PROMPTS for i in range(3)]
    assert adapter.sampled == expected
    assert adapter.batches == [4, 4, 4, 3]
    output = Path(building.output)
    for row in metadata(building):
        folder = (output / row[CHOSEN_FILE]).parent
        levels = {p.name: Image.open(p).getpixel((0, 0))[0] for p in folder.iterdir()}  # type: ignore[index]
        assert len(levels) == 3
        assert levels[Path(row[CHOSEN_FILE]).name] == max(levels.values())
        assert levels[Path(row[REJECTED_FILE]).name] == min(levels.values())
        assert row["margin"] == row["score_chosen"] - row["score_rejected"] > 0
    scores = (output / "scores.jsonl").read_text().splitlines()
    assert len(scores) == 15
    assert json.loads(scores[4])["prompt"] == "a blue cube"


@pytest.mark.parametrize(
    ("options", "count"),
    [({"rule": "all_pairs"}, 15), ({"rule": "top_k", "top_k": 2}, 5)],
)
def test_other_rules(building: PairsBuildConfig, options: dict[str, Any], count: int) -> None:
    for name, value in options.items():
        setattr(building, name, value)
    assert len(build(building).pairs) == count


def test_min_gap(building: PairsBuildConfig) -> None:
    build(building)
    margins = sorted(row["margin"] for row in metadata(building))
    building.min_gap = (margins[2] + margins[1]) / 2
    table = build(building)
    assert (len(table.pairs), table.ties) == (3, 2)
    building.min_gap = 2
    with pytest.raises(InputError, match=r"no pairs: .*min_gap 2"):
        build(building)


def test_shards_give_the_same_pairs(building: PairsBuildConfig, tmp_path: Path) -> None:
    build(building)
    expected = (Path(building.output) / "metadata.jsonl").read_bytes()
    for order in ((0, 1), (1, 0)):
        building.output = str(tmp_path / f"sharded-{order[0]}")
        building.num_shards = 2
        building.shard = order[0]
        first = FakeSampler()
        assert len(build(building, first).pairs) == 0
        assert not (Path(building.output) / "metadata.jsonl").exists()
        assert {prompt for prompt, _ in first.sampled} == set(PROMPTS[order[0] :: 2])
        building.shard = order[1]
        assert len(build(building).pairs) == 5
        assert (Path(building.output) / "metadata.jsonl").read_bytes() == expected


def test_same_picture_twice_makes_no_pair_twice(building: PairsBuildConfig) -> None:
    class Coarse(FakeSampler):
        def sample(self, *args: Any) -> Tensor:
            return super().sample(*args).round()

    building.rule = "all_pairs"
    table = build(building, Coarse())
    assert len(table.pairs) + table.ties == len(PROMPTS)
    assert len(table.pairs) > 0


def test_repeated_prompt_counts_once(
    building: PairsBuildConfig, caplog: pytest.LogCaptureFixture
) -> None:
    Path(building.prompts).write_text("a\nb\na\n")
    assert [pair.prompt for pair in build(building).pairs] == ["a", "b"]
    assert "1 prompts occur more than once" in caplog.text


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"prompts": ""}, "prompts is missing"),
        ({"shard": 2, "num_shards": 2}, "shard 2 is not in"),
        ({"candidates_per_prompt": 1}, "at least 2"),
        ({"min_gap": -1.0}, "min_gap"),
    ],
)
def test_bad_options(building: PairsBuildConfig, options: dict[str, Any], problem: str) -> None:
    for name, value in options.items():
        setattr(building, name, value)
    with pytest.raises(InputError, match=problem):
        build(building)


def test_run_reports(
    building: PairsBuildConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pairs_build, "load_adapter", lambda *_, **__: FakeSampler())
    monkeypatch.setattr(pairs_build, "load_reward", lambda *_: Brightness())
    building.num_shards = 2
    pairs_build.run(building)
    assert "process 0 of 2 is done; others are not yet" in capsys.readouterr().out
    building.shard = 1
    pairs_build.run(building)
    assert "5 pairs in " in capsys.readouterr().out
