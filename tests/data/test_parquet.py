from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmalign.config import PairsConfig
from mmalign.data.images import open_image
from mmalign.data.readers import PairTable, read_pairs
from mmalign.types import ImageRef, InputError

Png = Callable[..., bytes]


def read(path: Path | str, **options: Any) -> PairTable:
    return read_pairs(PairsConfig(path=str(path), **options))


def data(side: object) -> bytes:
    assert isinstance(side, ImageRef)
    return side.data if isinstance(side.data, bytes) else side.data.read_bytes()


def canonical(png: Png, count: int = 3, first: int = 0) -> dict[str, list[Any]]:
    numbers = range(first, first + count)
    return {
        "prompt": [f"prompt {n}" for n in numbers],
        "chosen": [png(2 * n) for n in numbers],
        "rejected": [png(2 * n + 1) for n in numbers],
    }


def pickapic(png: Png) -> dict[str, list[Any]]:
    labels = [1.0, 0.0, 0.5, 0.0]
    return {
        "caption": [f"prompt {n}" for n in range(4)],
        "jpg_0": [png(2 * n, format="JPEG") for n in range(4)],
        "jpg_1": [png(2 * n + 1, format="JPEG") for n in range(4)],
        "label_0": labels,
        "label_1": [1 - label for label in labels],
        "has_label": [True, True, True, False],
        "are_different": [True, True, True, True],
        "ranking_id": [1, 2, 3, 4],
    }


def write(path: Path, columns: dict[str, list[Any]], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_bytes(tmp_path: Path, png: Png) -> None:
    columns = canonical(png) | {"score_chosen": [1.0, 2.0, None], "margin": [None, None, 0.5]}
    table = read(write(tmp_path / "a.parquet", columns))
    assert [data(pair.chosen) for pair in table.pairs] == columns["chosen"]
    assert [data(pair.rejected) for pair in table.pairs] == columns["rejected"]
    assert [pair.score_chosen for pair in table.pairs] == [1, 2, None]
    assert [pair.margin for pair in table.pairs] == [None, None, 0.5]
    chosen = table.pairs[1].chosen
    assert isinstance(chosen, ImageRef)
    assert chosen.where.endswith("a.parquet row 2, chosen")


def test_structs_of_the_datasets_library(tmp_path: Path, png: Png) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "r.png").write_bytes(png(9))
    columns = {
        "prompt": ["a"],
        "chosen": [{"bytes": png(8), "path": "/home/someone/c.png"}],
        "rejected": [{"bytes": None, "path": "images/r.png"}],
    }
    (pair,) = read(write(tmp_path / "a.parquet", columns)).pairs
    assert (data(pair.chosen), data(pair.rejected)) == (png(8), png(9))


def test_written_by_the_datasets_library(tmp_path: Path, png: Png) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        prompt=datasets.Value("string"), chosen=datasets.Image(), rejected=datasets.Image()
    )
    rows = canonical(png)
    for name in ("chosen", "rejected"):
        rows[name] = [{"bytes": value, "path": None} for value in rows[name]]
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    assert [data(p.chosen) for p in read(tmp_path / "a.parquet").pairs] == canonical(png)["chosen"]


def test_relative_paths_and_traversal(tmp_path: Path, png: Png) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for number, name in enumerate(("c.png", "r.png", "../secret.png")):
        (folder / name).write_bytes(png(number))
    columns: dict[str, list[Any]] = {
        "prompt": ["a", "b", "c", "d"],
        "chosen": ["c.png", "../secret.png", str(tmp_path / "secret.png"), None],
        "rejected": ["r.png"] * 4,
    }
    file = write(folder / "a.parquet", columns)
    table = read(file, on_bad_row="skip")
    assert [data(pair.chosen) for pair in table.pairs] == [png(0)]
    where = [bad.where.rpartition("/")[2] for bad in table.bad_rows]
    assert where == ["a.parquet row 2", "a.parquet row 3", "a.parquet row 4"]
    problems = [bad.problem for bad in table.bad_rows]
    assert "'..' is not allowed" in problems[0]
    assert "is absolute" in problems[1]
    assert "chosen is missing" in problems[2]
    with pytest.raises(InputError, match="row 2: "):
        read(file)


def test_missing_column(tmp_path: Path, png: Png) -> None:
    columns = canonical(png)
    columns["choosen"] = columns.pop("chosen")
    file = write(tmp_path / "a.parquet", columns)
    with pytest.raises(InputError, match=r"column 'chosen' is missing; the nearest .* 'choosen'"):
        read(file, on_bad_row="skip")


def test_wrong_cell_type(tmp_path: Path, png: Png) -> None:
    columns = canonical(png) | {"chosen": [1, 2, 3]}
    with pytest.raises(InputError, match="row 1: an image cell is a int"):
        read(write(tmp_path / "a.parquet", columns))


def test_column_name_that_is_not_text(tmp_path: Path, png: Png) -> None:
    file = write(tmp_path / "a.parquet", canonical(png) | {"unused": [0, 0, 0]})
    file.write_bytes(file.read_bytes().replace(b"unused", b"unu\xa2ed"))
    with pytest.raises(InputError, match=r"a\.parquet is not a readable parquet file: 'utf-8'"):
        read(file)


@pytest.mark.parametrize(
    ("column", "cells"),
    [
        ("prompt", pa.array([b"\xff"], pa.binary()).view(pa.utf8())),
        ("margin", pa.array([2**31 - 1], pa.date32())),
    ],
)
def test_value_that_python_does_not_have(
    column: str, cells: pa.Array, tmp_path: Path, png: Png
) -> None:
    file = write(tmp_path / "a.parquet", canonical(png, count=1) | {column: cells})
    with pytest.raises(
        InputError, match=f"not a readable parquet file: a value of column '{column}'"
    ):
        read(file)


def test_broken_file(tmp_path: Path, png: Png) -> None:
    file = write(tmp_path / "a.parquet", canonical(png))
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"a\.parquet is not a readable parquet file"):
        read(file)
    write(tmp_path / "0.parquet", canonical(png))
    table = read(tmp_path, on_bad_row="skip")
    assert len(table.pairs) == 3
    assert table.bad_rows[0].where == str(file)


def test_folder_and_pattern(tmp_path: Path, png: Png) -> None:
    for number in range(2):
        write(tmp_path / f"train-{number:05d}-of-00002.parquet", canonical(png, 3, 3 * number))
    assert [p.prompt for p in read(tmp_path).pairs] == [f"prompt {n}" for n in range(6)]
    write(tmp_path / "test-00000-of-00001.parquet", canonical(png, 1, 50))
    with pytest.raises(InputError, match="has the splits test, train: choose one, such as"):
        read(tmp_path)
    assert len(read(tmp_path / "train-*.parquet").pairs) == 6
    with pytest.raises(InputError, match="no file matches"):
        read(tmp_path / "valid-*")


def test_linked_shard_out_of_the_folder(tmp_path: Path, png: Png) -> None:
    outside = write(tmp_path / "outside.parquet", canonical(png))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.parquet").symlink_to(outside)
    for path in (folder, folder / "*.parquet"):
        with pytest.raises(InputError, match="is a link out of"):
            read(path)


@pytest.mark.parametrize("group", [1, 7, 1000])
def test_any_order_of_access(tmp_path: Path, png: Png, group: int) -> None:
    columns = canonical(png, 50)
    pairs = read(write(tmp_path / "a.parquet", columns, row_group_size=group)).pairs
    for index in [0, 1, 49, 3, 3, 2, 20, 21, 22, 40, 0]:
        assert data(pairs[index].chosen) == columns["chosen"][index]
        assert data(pairs[index].rejected) == columns["rejected"][index]
    copy = pickle.loads(pickle.dumps(pairs))
    assert data(copy[17].chosen) == columns["chosen"][17]


def test_going_through_in_order_reads_each_batch_once(
    tmp_path: Path, png: Png, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = read(write(tmp_path / "a.parquet", canonical(png, 60), row_group_size=9)).pairs
    opened = []
    original = pq.ParquetFile

    def counting(*args: Any, **options: Any) -> Any:
        opened.append(args)
        return original(*args, **options)

    monkeypatch.setattr(pq, "ParquetFile", counting)
    assert len([data(pair.chosen) for pair in pairs]) == 60
    assert len(opened) == 1


def test_memory_is_that_of_a_page_not_of_a_row_group(tmp_path: Path, png: Png) -> None:
    noise = png(0, (80, 80), format="BMP")
    count = 2000
    columns = {
        "prompt": [f"{n}" for n in range(count)],
        "chosen": [noise[:-4] + n.to_bytes(4, "big") for n in range(count)],
        "rejected": [noise[:-4] + (count + n).to_bytes(4, "big") for n in range(count)],
    }
    file = tmp_path / "a.parquet"
    write(file, columns, write_batch_size=16, use_dictionary=False)
    assert file.stat().st_size > 50e6
    script = (
        "import sys, pyarrow as pa\n"
        "from mmalign.config import PairsConfig\n"
        "from mmalign.data.readers import read_pairs\n"
        "pairs = read_pairs(PairsConfig(path=sys.argv[1])).pairs\n"
        "assert all(pair.chosen.data != pair.rejected.data for pair in pairs)\n"
        "print(len(pairs), pa.default_memory_pool().max_memory())"
    )
    command = [sys.executable, "-c", script, str(file)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    number, peak = map(int, output.split())
    assert number == count
    assert peak < 12e6


def test_pickapic(tmp_path: Path, png: Png) -> None:
    columns = pickapic(png)
    table = read(write(tmp_path / "a.parquet", columns))
    assert table.ties == 2  # an explicit tie, and a row that nobody labelled
    assert [pair.prompt for pair in table.pairs] == ["prompt 0", "prompt 1"]
    assert [data(p.chosen) for p in table.pairs] == [columns["jpg_0"][0], columns["jpg_1"][1]]
    assert [data(p.rejected) for p in table.pairs] == [columns["jpg_1"][0], columns["jpg_0"][1]]


def test_pickapic_bad_labels_and_columns(tmp_path: Path, png: Png) -> None:
    columns = pickapic(png)
    columns["label_0"][1] = None
    columns["label_1"][0] = float("nan")
    table = read(write(tmp_path / "a.parquet", columns), on_bad_row="skip")
    assert [bad.problem for bad in table.bad_rows] == [
        "label_1 is nan, not a number from 0 to 1",
        "label_0 is None, not a number from 0 to 1",
    ]
    del columns["label_0"]
    with pytest.raises(InputError, match=r"column 'label_0' is missing; the nearest .* 'label_1'"):
        read(write(tmp_path / "a.parquet", columns))


def test_pickapic_of_photographs(tmp_path: Path, photos: dict[str, Image.Image]) -> None:
    import io

    def jpeg(name: str) -> bytes:
        stream = io.BytesIO()
        photos[name].save(stream, "JPEG", quality=95)
        return stream.getvalue()

    columns = {
        "caption": ["a person", "an animal"],
        "jpg_0": [jpeg("astronaut"), jpeg("coffee")],
        "jpg_1": [jpeg("rocket"), jpeg("chelsea")],
        "label_0": [1.0, 0.0],
        "label_1": [0.0, 1.0],
        "has_label": [True, True],
    }
    pairs = read(write(tmp_path / "train.parquet", columns)).pairs
    names = ["astronaut", "chelsea"]
    for pair, name in zip(pairs, names, strict=True):
        assert isinstance(pair.chosen, ImageRef)
        picture = open_image(pair.chosen, max_pixels=10_000)
        small, original = (image.resize((8, 6)).tobytes() for image in (picture, photos[name]))
        assert max(abs(a - b) for a, b in zip(small, original, strict=True)) < 12


def test_huggingface_metadata_does_not_matter(tmp_path: Path, png: Png) -> None:
    table = pa.table(canonical(png)).replace_schema_metadata({"huggingface": json.dumps({"x": 1})})
    pq.write_table(table, tmp_path / "a.parquet")
    assert len(read(tmp_path / "a.parquet").pairs) == 3
