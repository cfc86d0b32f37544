from __future__ import annotations

import json
import logging
import math
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.checkpoint import (
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    pack,
    save_checkpoint,
    unpack,
)
from mmalign.types import InputError


def save(folder: Path, step: int, keep: int = 2) -> Path:
    tensors = {
        "model": {"w": torch.full((3, 5), float(step)), "b": torch.tensor(float(step))},
        "training": {"moment": torch.arange(7.0) + step},
    }
    return save_checkpoint(folder, step, tensors, {"step": step, "third": 1 / 3}, keep)


def in_child(action: Callable[[], object]) -> int:
    """Run `action` in a fork; returns its exit code, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except InputError:
            os._exit(2)
        except BaseException:
            os._exit(99)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_round_trip_is_exact(tmp_path: Path) -> None:
    tensors = {
        "model": {"half": torch.randn(4, 3).to(torch.bfloat16), "view": torch.randn(4, 6).T},
        "training": {"count": torch.tensor([2**53 + 1]), "scalar": torch.tensor(0.1)},
    }
    path = save_checkpoint(tmp_path, 12, tensors, {"lr": 0.1 + 0.2, "names": ["a"]}, keep=1)
    loaded = load_checkpoint(path)
    assert loaded.step == 12
    assert loaded.state == {"lr": 0.1 + 0.2, "names": ["a"]}
    for group, values in tensors.items():
        assert loaded.tensors[group].keys() == values.keys()
        for name, value in values.items():
            assert loaded.tensors[group][name].dtype == value.dtype
            assert torch.equal(loaded.tensors[group][name], value)


def test_tensors_that_share_memory_are_saved_whole(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    path = save_checkpoint(tmp_path, 1, {"model": {"a": base, "b": base[2:4]}}, {}, keep=1)
    assert load_checkpoint(path).tensors["model"]["b"].tolist() == [2.0, 3.0]


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        save(tmp_path, step, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-15", "checkpoint-20"]
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-15", "checkpoint-20"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-20"


def test_leftovers_that_are_links_or_files_are_removed(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "checkpoints"
    (outside / "precious").mkdir(parents=True)
    folder.mkdir()
    (folder / ".tmp-1").symlink_to(outside)
    (folder / ".old-1").symlink_to(tmp_path / "nowhere")
    (folder / ".tmp-2").touch()
    save(folder, 1)
    assert [path.name for path in folder.iterdir()] == ["checkpoint-1"]
    assert (outside / "precious").is_dir()


def test_no_folder_or_empty_folder_has_no_latest(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "missing") is None
    assert latest_checkpoint(tmp_path) is None


FILE_CALLS = [
    (os, "replace"),
    (os, "fsync"),
    (os, "open"),
    (os, "rmdir"),
    (os, "unlink"),
    (Path, "mkdir"),
    (Path, "write_text"),
    (Path, "stat"),
    (Path, "open"),
]


def kill_at_call(number: int, *, after: bool) -> None:
    """Patch every call that touches a file so that the process dies at the `number`-th."""
    import mmalign.checkpoint as module

    count = 0

    def guard(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            mine = count == number
            if mine and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for owner, name in FILE_CALLS:
        setattr(owner, name, guard(getattr(owner, name)))
    module.save_file = guard(module.save_file)  # type: ignore[assignment]
    shutil.rmtree = guard(shutil.rmtree)  # type: ignore[assignment]


@pytest.mark.parametrize("after", [False, True])
def test_sigkill_at_every_file_boundary(tmp_path: Path, after: bool) -> None:
    """Whenever a save dies, the old checkpoint or the new one is valid; the next save works."""
    base = tmp_path / "base"
    save(base, 1, keep=1)
    killed = 0
    for number in range(1, 500):
        folder = tmp_path / f"run-{number}"
        shutil.copytree(base, folder)

        def attempt(folder: Path = folder, number: int = number) -> None:
            kill_at_call(number, after=after)
            save(folder, 2, keep=1)

        code = in_child(attempt)
        assert code in (0, -signal.SIGKILL), code
        latest = latest_checkpoint(folder)
        assert latest is not None
        loaded = load_checkpoint(latest)
        assert torch.equal(loaded.tensors["model"]["w"], torch.full((3, 5), float(loaded.step)))
        save(folder, 3, keep=1)
        assert os.listdir(folder) == ["checkpoint-3"]
        shutil.rmtree(folder)
        if code == 0:
            break
        killed += 1
    assert code == 0
    assert killed > 20


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {"bit flip": flip_bit, "truncation": truncate, "missing": Path.unlink}
FILES = ["model.safetensors", "training.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_skipped_by_latest_and_refused_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    DAMAGE[damage](newest / name)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert str(newest) in caplog.text
    with pytest.raises(InputError, match="checkpoint-2"):
        load_checkpoint(newest)


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    truncate(save(tmp_path, 1) / "model.safetensors")
    with pytest.raises(InputError, match="all 1 checkpoints are damaged"):
        latest_checkpoint(tmp_path)


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    save(tmp_path, 1)
    truncate(save(tmp_path, 2) / "model.safetensors")
    load_checkpoint(save(tmp_path, 2))
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/hostname", "sub/file.safetensors"]
)
def test_a_manifest_cannot_point_outside_its_folder(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["state.json"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="manifest"):
        load_checkpoint(path)


def test_links_and_manifests_without_end_are_damage(tmp_path: Path) -> None:
    path = save(tmp_path / "a", 1)
    (path / "state.json").rename(tmp_path / "state.json")
    (path / "state.json").symlink_to(tmp_path / "state.json")
    with pytest.raises(InputError, match=r"state\.json is missing or a link"):
        load_checkpoint(path)
    path = save(tmp_path / "b", 1)
    (path / "manifest.json").write_text("[" * 200_000)
    with pytest.raises(InputError, match=r"no readable manifest\.json"):
        load_checkpoint(path)


def test_a_named_checkpoint_must_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such checkpoint folder"):
        load_checkpoint(tmp_path / "checkpoint-7")
    with pytest.raises(InputError, match="must be checkpoint-<step>"):
        load_checkpoint(tmp_path)


def test_pickle_is_neither_written_nor_read(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}
    (path / "model.safetensors").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(InputError, match=r"model\.safetensors has"):
        load_checkpoint(path)


def test_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    """A file size limit makes the operating system refuse the write, as a full disk does."""
    save(tmp_path, 1)

    def attempt() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        big = {"model": {"w": torch.zeros(100_000)}}
        try:
            save_checkpoint(tmp_path, 2, big, {}, keep=1)
        except InputError as error:
            text = str(error)
            os._exit(2 if str(tmp_path) in text and "\n" not in text else 3)

    assert in_child(attempt) == 2
    assert os.listdir(tmp_path) == ["checkpoint-1"]
    assert load_checkpoint(tmp_path / "checkpoint-1").step == 1


def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    save(tmp_path, 1)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(InputError, match=r"Permission denied.*earlier checkpoints are intact"):
        save(tmp_path, 2)
    assert os.listdir(tmp_path) == ["checkpoint-1"]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write a checkpoint"):
        save(tmp_path / "file", 1)


def test_pack_and_unpack_are_inverse() -> None:
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "moments": [torch.ones(2), (1, "x")]}, 1: {}},
        "scale": 65536.0,
        "flag": True,
        "none": None,
        "inf": math.inf,
    }
    skeleton, tensors = pack(tree)
    back = unpack(json.loads(json.dumps(skeleton)), tensors)
    assert list(back["state"]) == [0, 1]
    assert back["state"][0]["moments"][1] == (1, "x")
    assert torch.equal(back["state"][0]["step"], torch.tensor(3.0))
    assert (back["scale"], back["flag"], back["none"], back["inf"]) == (
        65536.0,
        True,
        None,
        math.inf,
    )


def test_pack_refuses_what_it_cannot_restore() -> None:
    with pytest.raises(TypeError, match=r"state\.a: cannot save a set"):
        pack({"a": {1, 2}})
    with pytest.raises(TypeError, match="must be str or int"):
        pack({1.5: 1})
