"""An index of weights in parts names files beside it, or is refused before any is opened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmalign.data.weight_index import refuse_foreign_shards
from mmalign.types import InputError

INDEX = "model.safetensors.index.json"


def write(folder: Path, name: object) -> None:
    folder.mkdir(exist_ok=True)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": name}}))


@pytest.mark.parametrize("name", ["../a.safetensors", "/a.safetensors", "..", "", "a\\b", None, 7])
def test_names_that_lead_elsewhere(tmp_path: Path, name: object) -> None:
    write(tmp_path, name)
    with pytest.raises(InputError, match=rf"{INDEX}: names '.*', which is no file beside it"):
        refuse_foreign_shards(str(tmp_path))
    write(tmp_path / "text_encoder", name)
    (tmp_path / INDEX).unlink()
    refuse_foreign_shards(str(tmp_path))
    with pytest.raises(InputError, match="text_encoder"):
        refuse_foreign_shards(str(tmp_path), subfolder="text_encoder")


def test_of_a_variant(tmp_path: Path) -> None:
    write(tmp_path, "/a")
    (tmp_path / INDEX).rename(tmp_path / "model.safetensors.index.fp16.json")
    refuse_foreign_shards(str(tmp_path))
    with pytest.raises(InputError, match="no file beside it"):
        refuse_foreign_shards(str(tmp_path), variant="fp16")


def test_plain_names_and_no_index(tmp_path: Path) -> None:
    refuse_foreign_shards(str(tmp_path))
    write(tmp_path, "2.safetensors")
    refuse_foreign_shards(str(tmp_path))


def test_of_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_foreign_shards("somebody/nothing", offline=True)  # its loader says that it is absent

    def fails(*arguments: object, **options: object) -> None:
        raise OSError("no such revision\nand more")

    monkeypatch.setattr("transformers.utils.cached_file", fails)
    with pytest.raises(InputError, match=r"^somebody/nothing: .* looked up: no such revision$"):
        refuse_foreign_shards("somebody/nothing")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000])
def test_damaged(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(InputError, match="is no index of weights"):
        refuse_foreign_shards(str(tmp_path))
