"""A folder of shards' results is of certain shards, rewards and rules, and of no others."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from tars import write_tar

from mmalign.config import PairsBuildConfig, RewardConfig, ScoreConfig
from mmalign.pipelines import pairs_build, score
from mmalign.types import InputError

ROWS = 4


def bitmap(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level, level, level)).save(buffer, "BMP")
    return buffer.getvalue()


def make(folder: Path, first: int) -> Path:
    """Write two shards of grey pictures, which differ in nothing but the levels of grey."""
    folder.mkdir()
    for number in range(2):
        members = []
        for row in range(ROWS):
            members.append((f"{row}.bmp", bitmap(first + 10 * row + number)))
            members.append((f"{row}.txt", f"p{number}".encode()))
        write_tar(folder / f"{number:06d}.tar", members)
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return make(tmp_path / "shards", 100)


def scores(shards: Path, output: Path, **options: Any) -> None:
    options = {"reward": ["brightness"], **options}
    score.run(ScoreConfig(images=f"{shards}/*.tar", output=str(output), **options))


def pairs(shards: Path, output: Path, **options: Any) -> None:
    options = {"rewards": [RewardConfig(name="brightness")], **options}
    where = {"images": f"{shards}/*.tar", "output": str(output), "device": "cpu"}
    pairs_build.run(PairsBuildConfig(**where, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("job", [scores, pairs])
def test_results_of_another_shard_of_the_name_are_refused(
    shards: Path, tmp_path: Path, job: Any
) -> None:
    output = tmp_path / "out"
    job(shards, output)
    other = make(tmp_path / "other", 50)
    for one, two in zip(sorted(shards.iterdir()), sorted(other.iterdir()), strict=True):
        assert one.stat().st_size == two.stat().st_size
    with pytest.raises(InputError, match=r"shards/000000\.tar as it was .*other/000000\.tar is no"):
        job(other, output)
    (other / "000001.tar").write_bytes(b"")
    shutil.copy(shards / "000000.tar", other)
    with pytest.raises(InputError, match=r"000001\.tar is not the same: choose another output"):
        job(other, output)
    shutil.copy(tmp_path / "other" / "000001.tar", shards)  # the same place, other contents
    with pytest.raises(InputError, match=r"shards/000001\.tar is not the same"):
        job(shards, output)


def test_a_shard_that_moved_is_known_again(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores(shards, tmp_path / "out")
    before = [file.stat().st_mtime_ns for file in sorted((tmp_path / "out").glob("*.parquet"))]
    moved = shards.rename(tmp_path / "moved")
    os.utime(moved / "000000.tar")
    scores(moved, tmp_path / "out")
    assert "0 of 2 shards" in capsys.readouterr().err
    assert before == [
        file.stat().st_mtime_ns for file in sorted((tmp_path / "out").glob("*.parquet"))
    ]
    record = json.loads((tmp_path / "out" / "records" / "000000.json").read_text())
    assert record["shard"]["path"] == str(moved / "000000.tar")  # hashed once, not every time
    assert record["shard"]["mtime_ns"] == (moved / "000000.tar").stat().st_mtime_ns


def test_a_shard_that_changes_while_it_is_read_gets_no_record(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMALIGN_TEST_TOUCHED", str(shards / "000001.tar"))
    with pytest.raises(InputError, match=r"000001\.tar was changed while it was read"):
        scores(shards, tmp_path / "out", reward=[f"{__name__}:touch"])
    assert [file.name for file in (tmp_path / "out" / "records").iterdir()] == ["000000.json"]


def touch(images: Any, prompts: Any) -> Any:
    if prompts[0] == "p1":
        os.utime(os.environ["MMALIGN_TEST_TOUCHED"], (1, 1))
    return images.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"combine": "rank"}, "combine 'sum', not 'rank'"),
        ({"rule": "all_pairs"}, "rule 'best_worst', not 'all_pairs'"),
        ({"min_gap": 0.1}, "min_gap 0.0, not 0.1"),
        (
            {"rewards": [RewardConfig(), RewardConfig(name="saturation", eval_only=True)]},
            r"rewards \['brightness'\], not \['brightness', 'saturation'\]",
        ),
        ({"rewards": [RewardConfig(weight=2.0)]}, "rewards brightness weight 1.0, not 2.0"),
        ({"rewards": [RewardConfig(normalize="prompt_rank")]}, "normalize 'none', not 'prompt_r"),
    ],
)
def test_pairs_of_other_rules_are_refused(
    shards: Path, tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    for reward in options.get("rewards", [])[:1]:
        reward.name = "brightness"
    pairs(shards, tmp_path / "out")
    with pytest.raises(InputError, match=f"out has results of .*{named}"):
        pairs(shards, tmp_path / "out", **options)


def test_pairs_that_are_no_more_are_removed(shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    pairs(shards, output)
    (output / "records" / "000000.json").unlink()
    shutil.copy(shards / "000001.tar", tmp_path / "kept.tar")
    with (
        tarfile.open(shards / "000000.tar", "w") as archive,
        tarfile.open(tmp_path / "kept.tar") as source,
    ):
        for member in source.getmembers()[:2]:  # a single candidate
            archive.addfile(member, source.extractfile(member))
    pairs(shards, output)
    assert [file.name for file in output.glob("*.tar")] == ["000001.tar"]


def test_pairs_do_not_replace_their_candidates(shards: Path) -> None:
    with pytest.raises(InputError, match=r"output: .*shards has the shards themselves"):
        pairs(shards, shards)
    assert [file.name for file in sorted(shards.iterdir())] == ["000000.tar", "000001.tar"]


def rate(images: Any, prompts: Any, weights: str) -> Any:
    return images.mean((1, 2, 3)) * float(Path(weights).read_text())


def test_a_changed_reward_is_refused(shards: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.txt"
    weights.write_text("1.0")
    name = f"{__name__}:rate"
    options: dict[str, Any] = {"reward": [name], "options": {name: {"weights": str(weights)}}}
    scores(shards, tmp_path / "out", **options)
    weights.write_text("2.0")
    with pytest.raises(
        InputError, match=r"results of rewards \S+:rate files .*weights\.txt '\w+', n"
    ):
        scores(shards, tmp_path / "out", **options)
    watched = RewardConfig(name=name, options={"weights": str(weights)}, eval_only=True)
    rewards = [RewardConfig(name="brightness"), watched]
    pairs(shards, tmp_path / "pairs", rewards=rewards)
    watched.eval_only = False
    with pytest.raises(InputError, match="eval_only True, not False"):
        pairs(shards, tmp_path / "pairs", rewards=rewards)
    with pytest.raises(InputError, match="job 'pairs build', not 'score'"):
        scores(shards, tmp_path / "pairs")


def test_results_of_the_first_layout_and_damaged_ones_are_refused(
    shards: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    scores(shards, output)
    record = output / "records" / "000000.json"
    known = json.loads(record.read_text())
    for damaged in ("{", "[]", json.dumps({**known, "shard": None}), json.dumps({"rows": 4})):
        record.write_text(damaged)
        with pytest.raises(InputError, match=r"000000\.json is damaged: remove it"):
            scores(shards, output)
    first = {"rewards": [["brightness", {}]], "max_pixels": 50_000_000}
    for settings in (first, []):
        (output / "settings.json").write_text(json.dumps(settings))
        with pytest.raises(InputError, match="results of another version of mmalign"):
            scores(shards, output)


def test_names_that_are_not_unicode_are_escaped(tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    with tarfile.open(tmp_path / "odd" / "0.tar", "w") as archive:
        for level in (10, 200):
            buffer = io.BytesIO()
            Image.new("RGB", (8, 8), (level, level, level)).save(buffer, "PNG")
            key = f"{level}\udcff"
            for name, data in ((f"{key}.png", buffer.getvalue()), (f"{key}.txt", b"p")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    scores(tmp_path / "odd", tmp_path / "scores")
    pairs(tmp_path / "odd", tmp_path / "pairs")
    for file in (tmp_path / "scores" / "0.parquet", tmp_path / "pairs" / "scores" / "0.parquet"):
        rows = pq.read_table(file).to_pylist()
        assert [row["file_name"] for row in rows] == [r"10\udcff.png", r"200\udcff.png"]
