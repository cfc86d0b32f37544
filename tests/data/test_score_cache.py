"""A cache of scores: keys, sharing between processes, and every way in which a file can be bad."""

from __future__ import annotations

import logging
import multiprocessing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mmalign.data import score_cache
from mmalign.data.score_cache import ScoreCache, image_key, response_key
from mmalign.types import ImageRef, InputError, Response

IDENTITY = {"name": "r", "options": {}}


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def cache(folder: Path, **identity: Any) -> ScoreCache:
    return ScoreCache(folder, "my reward", {**IDENTITY, **identity})


def filled(folder: Path, numbers: range) -> Path:
    """Write one file of the cache and return it."""
    before = set(folder.rglob("*.parquet"))
    store = cache(folder)
    store.put({key(n): float(n) for n in numbers})
    store.save()
    (file,) = set(folder.rglob("*.parquet")) - before
    return file


def test_scores_come_back_in_another_run(tmp_path: Path) -> None:
    filled(tmp_path, range(3))
    store = cache(tmp_path)
    assert store.get([key(2), key(5), key(0)]) == [2.0, None, 0.0]
    assert (store.hits, store.misses) == (2, 1)
    assert store.folder.name.startswith("my-reward-")


def test_what_a_score_depends_on_names_the_folder(tmp_path: Path) -> None:
    filled(tmp_path, range(3))
    assert cache(tmp_path, options={"model": "other"}).get([key(1)]) == [None]
    assert len(list(tmp_path.iterdir())) == 2


def test_image_keys_know_pixels_shape_and_prompt() -> None:
    image = torch.rand(3, 4, 6).mul(255).round() / 255
    same = image.clone() + 1e-4  # what a lossless file does to it
    others = [image.transpose(1, 2), image.reshape(3, 6, 4), 1 - image]
    keys = {image_key(other, "a") for other in others} | {image_key(image, "b")}
    assert image_key(image, "a") == image_key(same, "a")
    assert len(keys | {image_key(image, "a")}) == 5


def test_response_keys_know_everything(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    ref = ImageRef(tmp_path / "a.png", "a.png")
    red, blue = (Image.new("RGB", (4, 4), color) for color in ("red", "blue"))
    answers = [
        Response(text="yes"),
        Response(text="no"),
        Response(text="yes", images=(ref,)),
        Response(text="yes", images=(red,)),
        Response(text="yes", images=(blue,)),
        Response(text="yes", fields={"label": "yes"}),
    ]
    keys = {response_key(answer, "q") for answer in answers}
    assert len(keys | {response_key(answers[0], "another")}) == len(answers) + 1
    assert response_key(answers[2], "q") == response_key(answers[2], "q")
    with pytest.raises(InputError, match=r"gone\.png: the file does not exist"):
        response_key(Response(text="x", images=(ImageRef(tmp_path / "gone", "gone.png"),)), "q")


def flip_a_bit(file: Path) -> None:
    """Change a stored score in a way that only the checksum can tell."""
    data = bytearray(file.read_bytes())
    data[data.find(key(1))] ^= 1
    file.write_bytes(data)


def other_columns(file: Path) -> None:
    pq.write_table(pa.table({"key": ["a"], "score": [1.0]}), file)


def not_a_number(file: Path) -> None:
    table = {"key": pa.array([key(1)], pa.binary(16)), "score": pa.array([float("nan")])}
    pq.write_table(pa.table(table), file)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-20]),
        lambda file: file.write_bytes(b"\x80\x04N."),
        flip_a_bit,
        other_columns,
        not_a_number,
    ],
    ids=["empty", "cut off", "pickle", "flipped bit", "columns", "nan"],
)
def test_damaged_files_are_reported_and_made_again(
    damage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path, range(10, 20))
    file = filled(tmp_path, range(3))
    damage(file)
    with caplog.at_level(logging.WARNING):
        store = cache(tmp_path)
    assert f"score cache: {file} is damaged" in caplog.text
    assert store.get([key(1), key(12)]) == [None, 12.0]
    store.put({key(1): 1.0})
    store.save()
    caplog.clear()
    assert cache(tmp_path).get([key(1), key(12)]) == [1.0, 12.0]
    assert caplog.text == ""


def test_many_files_become_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_cache, "MOST_FILES", 3)
    for number in range(4):
        filled(tmp_path, range(number, number + 1))
    assert cache(tmp_path).get([key(n) for n in range(4)]) == [0.0, 1.0, 2.0, 3.0]
    assert len(list(tmp_path.rglob("*.parquet"))) == 1
    assert cache(tmp_path).get([key(3)]) == [3.0]


def test_a_file_that_another_process_has_just_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path, range(3))
    read = score_cache._scores

    def late(file: Path) -> dict[bytes, float]:
        file.unlink()
        return read(file)

    monkeypatch.setattr(score_cache, "_scores", late)
    with caplog.at_level(logging.WARNING):
        assert cache(tmp_path).get([key(1)]) == [None]
    assert caplog.text == ""


def _work(folder: str, first: int) -> None:
    score_cache.MOST_FILES = 2
    for number in range(first, first + 5):
        store = cache(Path(folder))
        store.put({key(number): float(number)})
        store.save()


def test_two_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_work, args=(str(tmp_path), start)) for start in (0, 100)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    found = cache(tmp_path).get([key(n) for n in (*range(5), *range(100, 105))])
    assert None not in found


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        cache(tmp_path / "file")
