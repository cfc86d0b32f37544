from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mmalign.config import PairsConfig
from mmalign.data.images import read_image_bytes
from mmalign.data.readers import read_pairs
from mmalign.data.writers import WriteFormat, write_pairs
from mmalign.types import ImageRef, InputError, PreferencePair

FORMATS = [("imagefolder", "out"), ("parquet", "out.parquet"), ("webdataset", "out.tar")]


@pytest.fixture
def pairs(png: Callable[..., bytes]) -> list[PreferencePair]:
    return [
        PreferencePair(
            pair_id=f"id {n}",
            prompt=f'prompt {n} "quoted" äöü\nnew line',
            chosen=ImageRef(png(2 * n), "c"),
            rejected=ImageRef(png(2 * n + 1, format="JPEG"), "r"),
            score_chosen=0.1 + n if n else None,
            score_rejected=0.05 if n else None,
            margin=0.1 + n - 0.05 if n else None,
            source="test" if n else None,
        )
        for n in range(4)
    ]


def strip(pair: PreferencePair) -> tuple[object, ...]:
    assert isinstance(pair.chosen, ImageRef)
    assert isinstance(pair.rejected, ImageRef)
    images = read_image_bytes(pair.chosen), read_image_bytes(pair.rejected)
    scores = pair.score_chosen, pair.score_rejected, pair.margin
    return (pair.pair_id, pair.prompt, *scores, pair.source, *images)


@pytest.mark.parametrize(("format", "name"), FORMATS)
def test_round_trip(
    pairs: list[PreferencePair], tmp_path: Path, format: WriteFormat, name: str
) -> None:
    write_pairs(pairs, tmp_path / name, format)
    table = read_pairs(PairsConfig(path=str(tmp_path / name)))
    assert [strip(pair) for pair in table.pairs] == [strip(pair) for pair in pairs]


def test_folder_of_shards(
    pairs: list[PreferencePair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmalign.data.writers.SHARD_SIZE", 3)
    write_pairs(pairs, tmp_path / "shards", "webdataset")
    names = sorted(path.name for path in (tmp_path / "shards").iterdir())
    assert names == ["shard-000000.tar", "shard-000001.tar"]
    table = read_pairs(PairsConfig(path=str(tmp_path / "shards")))
    assert [pair.pair_id for pair in table.pairs] == [pair.pair_id for pair in pairs]


def test_lazy_pairs_from_one_format_to_another(pairs: list[PreferencePair], tmp_path: Path) -> None:
    write_pairs(pairs, tmp_path / "a.parquet", "parquet")
    lazy = read_pairs(PairsConfig(path=str(tmp_path / "a.parquet"))).pairs
    write_pairs(lazy, tmp_path / "b", "imagefolder")
    again = read_pairs(PairsConfig(path=str(tmp_path / "b"))).pairs
    assert [strip(pair) for pair in again] == [strip(pair) for pair in pairs]


@pytest.mark.parametrize(("format", "name"), FORMATS[:2])
def test_the_datasets_library_loads_two_image_columns(
    pairs: list[PreferencePair], tmp_path: Path, format: WriteFormat, name: str
) -> None:
    datasets = pytest.importorskip("datasets")
    write_pairs(pairs, tmp_path / name, format)
    kind = "parquet" if format == "parquet" else "imagefolder"
    source = {"data_files": str(tmp_path / name)}
    if format == "imagefolder":
        source = {"data_dir": str(tmp_path / name)}
    cache = str(tmp_path / "cache")
    rows = datasets.load_dataset(kind, split="train", cache_dir=cache, **source)
    assert len(rows) == 4
    assert isinstance(rows[1]["chosen"], Image.Image)
    assert isinstance(rows[1]["rejected"], Image.Image)
    assert rows[1]["margin"] == pytest.approx(1.05)


def test_refusals(pairs: list[PreferencePair], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no pairs to write"):
        write_pairs([], tmp_path / "a")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="is not empty"):
        write_pairs(pairs, tmp_path / "used")
    with pytest.raises(InputError, match="cannot write 'csv'"):
        write_pairs(pairs, tmp_path / "a", "csv")  # type: ignore[arg-type]
    text = PreferencePair(pair_id="t", prompt="x", chosen="yes", rejected="no")
    with pytest.raises(InputError, match="pair t has texts"):
        write_pairs([text], tmp_path / "b")


@pytest.mark.parametrize(("format", "name"), FORMATS)
def test_bad_image_leaves_nothing_that_can_be_read(
    pairs: list[PreferencePair], tmp_path: Path, format: WriteFormat, name: str
) -> None:
    bad = PreferencePair(
        pair_id="b", prompt="x", chosen=ImageRef(b"text", "row 9"), rejected=pairs[0].rejected
    )
    with pytest.raises(InputError, match="row 9: not an image"):
        write_pairs([*pairs, bad], tmp_path / name, format)
    with pytest.raises(InputError):
        read_pairs(PairsConfig(path=str(tmp_path / name)))
