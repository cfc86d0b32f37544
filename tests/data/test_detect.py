from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mmalign.data.detect import open_source
from mmalign.data.folders import Hpdv2Pairs, ImagefolderPairs, WinLosePairs
from mmalign.types import InputError


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="path of the pairs is missing"):
        open_source("")
    with pytest.raises(InputError, match="no does not exist"):
        open_source(str(tmp_path / "no"))
    (tmp_path / "readme.md").write_text("x")
    with pytest.raises(InputError, match=r"no pairs found .*looked for \*\.parquet, \*\.tar"):
        open_source(str(tmp_path))
    with pytest.raises(InputError, match=r"readme\.md is none of"):
        open_source(str(tmp_path / "readme.md"))


def test_ambiguous(imagefolder: Callable[..., Path]) -> None:
    folder = imagefolder()
    (folder / "train.json").write_text("[]")
    with pytest.raises(InputError, match="looks like imagefolder and hpdv2: choose one"):
        open_source(str(folder))
    assert isinstance(open_source(str(folder), "imagefolder"), ImagefolderPairs)
    assert isinstance(open_source(str(folder), "hpdv2"), Hpdv2Pairs)


def test_metadata_decides_between_imagefolder_and_win_lose(tmp_path: Path) -> None:
    for name in ("chosen", "rejected"):
        (tmp_path / name).mkdir()
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text(json.dumps({"file_name": "a", "prompt": "x"}))
    assert isinstance(open_source(str(tmp_path)), WinLosePairs)
    metadata.write_text(json.dumps({"chosen_file_name": "chosen/a.png", "prompt": "x"}))
    assert isinstance(open_source(str(tmp_path)), ImagefolderPairs)


def test_metadata_linked_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_text(json.dumps({"chosen_file_name": "a.png"}))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "metadata.jsonl").symlink_to(tmp_path / "secret.jsonl")
    for format in ("auto", "imagefolder"):
        with pytest.raises(InputError, match="is a link out of"):
            open_source(str(folder), format)


def test_two_couples_of_folders(tmp_path: Path) -> None:
    for name in ("w", "l", "win", "lose"):
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match="has 2 couples of folders"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("format", ["parquet", "webdataset", "imagefolder", "hpdv2", "win_lose"])
def test_format_that_is_not_there(tmp_path: Path, format: str) -> None:
    with pytest.raises(InputError, match=r"has no|has 0|does not exist"):
        open_source(str(tmp_path), format)


def test_format_that_does_not_fit_the_file(imagefolder: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="looks like imagefolder, not like the format parquet"):
        open_source(str(imagefolder() / "metadata.jsonl"), "parquet")
