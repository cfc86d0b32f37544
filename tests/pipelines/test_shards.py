"""Scores and pairs of webdataset shards: shared, restarted, and the same as of a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tars import plain, write_tar

from mmalign.config import PairsBuildConfig, PairsConfig, RewardConfig, ScoreConfig
from mmalign.data.readers import read_pairs
from mmalign.data.schema import BadRow
from mmalign.data.webdataset import ShardImage, stream_images
from mmalign.pipelines import pairs_build, score
from mmalign.preflight import check_config
from mmalign.types import InputError

BRIGHTNESS = RewardConfig(name="brightness")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards with two prompts of three grey pictures each."""
    folder = tmp_path / "shards"
    for number in range(3):
        members = []
        for row in range(6):
            key = f"{number}{row:03d}"
            prompt = f"prompt {number} {row % 2}"
            text = json.dumps({"prompt": prompt}).encode()
            members += [(f"{key}.png", plain(40 * row + number))]
            members += [(f"{key}.txt", prompt.encode()) if row < 3 else (f"{key}.json", text)]
        write_tar(folder / f"{number:06d}.tar", members)
    return folder


def scored(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_scores_of_all_shards(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ScoreConfig(
        reward=["brightness"], images=str(shards), output=str(tmp_path / "out"), batch_size=4
    )
    check_config(config)
    score.run(config)
    rows = scored(tmp_path / "out")
    assert len(rows) == 18
    assert rows[7]["file_name"] == "1001.png"
    assert rows[7]["prompt"] == "prompt 1 1"
    assert rows[7]["brightness"] == pytest.approx(41 / 255)
    printed = capsys.readouterr().out
    assert "18 images scored, 0 skipped" in printed
    mean, low, high = (float(cell) for cell in printed.splitlines()[1].split()[1:])
    values = [row["brightness"] for row in rows]
    assert (mean, low, high) == pytest.approx(
        (sum(values) / 18, min(values), max(values)), abs=1e-4
    )


HUNGRY: list[int] = []


def hungry(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Have memory for two images."""
    HUNGRY.append(len(images))
    if len(images) > 2:
        raise MemoryError
    return images.mean((1, 2, 3))


def test_memory_that_ends_halves_the_batch(shards: Path, tmp_path: Path) -> None:
    name = f"{__name__}:hungry"
    scores = {}
    for reward in ("brightness", name):
        output = tmp_path / f"scores-{len(reward)}"
        score.run(ScoreConfig(reward=[reward], images=str(shards), output=str(output)))
        scores[reward] = [row[reward] for row in scored(output)]
    assert scores[name] == pytest.approx(scores["brightness"], rel=1e-5)
    HUNGRY.clear()
    pairs_build.run(
        PairsBuildConfig(
            images=str(shards), output=str(tmp_path / "pairs"), rewards=[RewardConfig(name=name)]
        )
    )
    assert HUNGRY[0] > 2
    assert max(HUNGRY[2:]) <= 2


def test_processes_share_the_shards_and_a_restart_does_what_is_missing(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    output = tmp_path / "out"
    options = {"reward": ["brightness"], "images": f"{shards}/*.tar", "output": str(output)}
    score.run(ScoreConfig(**options, num_shards=2, shard=1))
    assert [file.name for file in output.glob("*.parquet")] == ["000001.parquet"]
    assert "process 1 of 2 is done; others are not yet" in capsys.readouterr().out
    before = (output / "000001.parquet").stat().st_mtime_ns
    (output / "records" / "000002.json").unlink(missing_ok=True)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    score.run(ScoreConfig(**options))
    assert len(scored(output)) == 18
    assert "18 images scored" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "1")
    score.run(ScoreConfig(**options))
    assert (output / "000001.parquet").stat().st_mtime_ns == before
    other = RewardConfig(name="saturation")
    with pytest.raises(InputError, match="choose another output folder"):
        score.run(ScoreConfig(**{**options, "reward": [other.name]}))


def test_bad_rows_of_shards_stop_or_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    write_tar(
        folder / "a.tar",
        [
            ("0.png", plain(10)),
            ("0.txt", b"fine"),
            ("1.png", b"no picture"),
            ("1.txt", b"broken"),
            ("2.png", plain(20)),
            ("3.txt", b"alone"),
            ("4/../../x.png", plain(5)),
            ("4/../../x.txt", b"outside"),
        ],
    )
    rows = list(stream_images(folder / "a.tar"))
    assert [isinstance(row, ShardImage) for row in rows] == [True, True, False, False, False]
    assert all("sample" in str(row) for row in rows if isinstance(row, BadRow))
    options = {"reward": ["brightness"], "images": str(folder)}
    with pytest.raises(InputError, match=r"a.tar member 1.png"):
        score.run(ScoreConfig(**options, output=str(tmp_path / "stop")))
    score.run(ScoreConfig(**options, output=str(tmp_path / "skip"), on_bad_row="skip"))
    record = json.loads((tmp_path / "skip" / "records" / "a.json").read_text())
    assert (record["rows"], record["skipped"]) == (1, 4)
    (folder / "b.tar").write_bytes(b"x" * 2000)
    with pytest.raises(InputError, match="the tar file is broken"):
        score.run(ScoreConfig(**options, output=str(tmp_path / "skip"), on_bad_row="skip"))


def build(shards: Path, output: Path, **more: Any) -> None:
    options: dict[str, Any] = {"images": str(shards), "output": str(output), "device": "cpu"}
    options |= {"rewards": [BRIGHTNESS], **more}
    config = PairsBuildConfig(**options)
    check_config(config)
    pairs_build.run(config)


def test_pairs_of_shards_are_readable_shards(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(shards, tmp_path / "one", rule="all_pairs")
    assert "18 pairs of 18 images" in capsys.readouterr().out
    table = read_pairs(PairsConfig(path=f"{tmp_path}/one/*.tar"))
    assert len(table.pairs) == 18
    best = table.pairs[0]
    assert (best.prompt, best.pair_id) == ("prompt 0 0", "000000/0004/0002")
    assert best.margin == pytest.approx(80 / 255)
    for shard in range(2):
        build(shards, tmp_path / "two", rule="all_pairs", num_shards=2, shard=shard)
    for file in sorted((tmp_path / "one").glob("*.tar")):
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes()


def test_what_shards_cannot_do_is_refused(shards: Path, tmp_path: Path) -> None:
    normalized = RewardConfig(name="brightness", normalize="zscore")
    with pytest.raises(InputError, match="normalized over all scores"):
        build(shards, tmp_path / "out", rewards=[normalized])
    with pytest.raises(InputError, match="no pairs"):
        build(shards, tmp_path / "gap", min_gap=2.0)
    write_tar(tmp_path / "shards" / "more" / "000000.tar", [("0.png", plain(1))])
    with pytest.raises(InputError, match="no shard matches"):
        score.run(ScoreConfig(reward=["brightness"], images=f"{tmp_path}/none-*.tar"))
    with pytest.raises(InputError, match="prompts: is required"):
        score.run(ScoreConfig(reward=["brightness"], images=str(tmp_path)))
