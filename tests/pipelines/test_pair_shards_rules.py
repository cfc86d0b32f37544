"""Pairs of webdataset shards follow the same rules as those of a folder, or say why not."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from tars import plain, write_tar
from torch import Tensor

from mmalign.config import Combination, PairRule, PairsBuildConfig, PairsConfig, RewardConfig
from mmalign.data.readers import read_pairs
from mmalign.pipelines import pairs_build
from mmalign.types import InputError

COLORS = {
    "p": [(200, 50, 0), (100, 50, 255), (150, 20, 100), (40, 90, 30)],
    "q": [(10, 20, 250), (30, 10, 40), (250, 0, 5)],
}


def by_hand(images: Tensor, prompts: Sequence[str], channel: int = 0) -> Tensor:
    """Score by one channel of the first pixel."""
    return images[:, channel, 0, 0]


def channel(number: int, **more: Any) -> RewardConfig:
    return RewardConfig(name=f"{__name__}:by_hand", options={"channel": number}, **more)


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Lay the same candidates out twice: as a folder with a table, and as a shard."""
    folder, rows, members = tmp_path / "folder", [], []
    folder.mkdir()
    for prompt, colors in COLORS.items():
        for number, color in enumerate(colors):
            name, picture = f"{prompt}{number}.png", plain(color)
            (folder / name).write_bytes(picture)
            rows.append(json.dumps({"file_name": name, "prompt": prompt}))
            members += [(name, picture), (f"{prompt}{number}.txt", prompt.encode())]
    write_tar(tmp_path / "shards" / "000000.tar", members)
    (folder / "table.jsonl").write_text("\n".join(rows))
    table = {"images": str(folder), "prompts": str(folder / "table.jsonl")}
    return table, {"images": str(tmp_path / "shards")}


def pairs(source: dict[str, Any], output: Path, **options: Any) -> list[tuple[Any, ...]]:
    """Build pairs; returns prompt, the colors of both sides, and both scores of each."""
    pairs_build.run(PairsBuildConfig(**source, output=str(output), device="cpu", **options))
    found = []
    for pair in read_pairs(PairsConfig(path=str(output))).pairs:
        sides = [Image.open(io.BytesIO(_bytes(side))) for side in (pair.chosen, pair.rejected)]
        colors = [side.convert("RGB").getpixel((0, 0)) for side in sides]
        scores = (pytest.approx(pair.score_chosen), pytest.approx(pair.score_rejected))
        found.append((pair.prompt, *colors, *scores))
    return found


def _bytes(side: Any) -> bytes:
    return side.data if isinstance(side.data, bytes) else Path(side.data).read_bytes()


@pytest.mark.parametrize("combine", ["sum", "zscore", "rank"])
@pytest.mark.parametrize("rule", ["best_worst", "all_pairs", "pareto"])
def test_shards_pair_what_a_folder_pairs(
    pictures: tuple[dict[str, Any], dict[str, Any]],
    tmp_path: Path,
    combine: Combination,
    rule: PairRule,
) -> None:
    folder, shards = pictures
    rewards = [channel(0), channel(1, weight=-0.3), channel(2, eval_only=True)]
    options: dict[str, Any] = {"combine": combine, "rule": rule, "rewards": rewards}
    expected = pairs(folder, tmp_path / "of-folder", **options)
    found = pairs(shards, tmp_path / "of-shards", **options)
    assert len(expected) >= 2
    assert found == expected
    if combine == "rank":
        assert all(abs(row[3].expected) <= 1 for row in found)


def test_scores_of_rewards_that_choose_nothing_are_written_down(
    pictures: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    folder, shards = pictures
    rewards = [channel(0), channel(2, eval_only=True)]
    options: dict[str, Any] = {"combine": "rank", "rewards": rewards}
    pairs(folder, tmp_path / "of-folder", **options)
    pairs(shards, tmp_path / "of-shards", **options)
    lines = (tmp_path / "of-folder" / "scores.jsonl").read_text().splitlines()
    (file,) = (tmp_path / "of-shards" / "scores").iterdir()
    assert file.name == "000000.parquet"
    found = pq.read_table(file).to_pylist()
    assert found == [json.loads(line) for line in lines]
    assert list(found[0])[:3] == ["file_name", "prompt", "score"]
    blue = [row[list(row)[4]] for row in found]
    assert blue == pytest.approx([c[2] / 255 for colors in COLORS.values() for c in colors])


def test_what_normalizes_over_all_scores_is_refused(
    pictures: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path
) -> None:
    _, shards = pictures
    output = tmp_path / "out"
    with pytest.raises(InputError, match=r"combine: gdpo .* shards never see together"):
        pairs(shards, output, combine="gdpo", rewards=[channel(0)])
    with pytest.raises(InputError, match=r"normalized over all scores, which shards never"):
        pairs(shards, output, rewards=[channel(0, normalize="zscore")])
    assert not output.exists()
    watched = channel(1, normalize="zscore", eval_only=True)  # its normalization is not used
    assert len(pairs(shards, output, rewards=[channel(0), watched])) == 2
