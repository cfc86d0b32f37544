"""Options of another type than the reward takes, and files that are no weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import pytest

from mmalign.config import RewardConfig
from mmalign.rewards import load_reward
from mmalign.rewards._options import check_types
from mmalign.rewards._pretrained import load_config
from mmalign.rewards._weights import load_tensors
from mmalign.rewards.clip import ClipReward
from mmalign.rewards.hpsv2 import HpsV2Reward
from mmalign.types import InputError


class Scorer(Protocol):
    def score(self) -> float: ...


class Options:
    def __init__(
        self,
        model: str | Scorer | None = None,
        kind: Literal["a", "b"] = "a",
        count: int = 1,
        share: float = 1.0,
        words: Sequence[str] = (),
        rules: dict[str, Any] | None = None,
        anything: Any = None,
        folder: Path | None = None,
    ) -> None: ...


@pytest.mark.parametrize(
    "options",
    [
        {"model": "x", "kind": "b", "count": 3, "share": 1, "words": ["y"], "rules": {}},
        {"model": None, "rules": None, "anything": {"a": [1]}},
        {"model": Options()},  # it may be a scorer: only a type checker can tell
        {"folder": "x"},  # the class may well turn it into one
        {"unknown": 1},
    ],
)
def test_what_fits_is_taken(options: dict[str, Any]) -> None:
    check_types("r", Options, options)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("model", 5, "model must be text or Scorer, got 5"),
        ("kind", "c", "kind must be one of a, b, got 'c'"),
        ("count", 1.5, "count must be a whole number, got 1.5"),
        ("count", True, "count must be a whole number, got True"),
        ("share", "0.5", "share must be a number, got '0.5'"),
        ("words", 3, "words must be a list, got 3"),
        ("rules", [], r"rules must be a mapping, got \[\]"),
    ],
)
def test_what_does_not_fit_is_named(option: str, value: Any, expected: str) -> None:
    with pytest.raises(InputError, match=f"^options of reward 'r': {expected}$"):
        check_types("r", Options, {option: value})


def test_annotations_that_only_a_type_checker_knows_are_left_alone() -> None:
    def initialize(self: Any, model: Any) -> None: ...

    initialize.__annotations__["model"] = "OnlyWhenTypeChecking"
    check_types("r", type("Other", (), {"__init__": initialize}), {"model": 5})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("clip", {"model": 5}),
        ("pickscore", {"model": 5}),
        ("vqascore", {"model": "x", "dtype": "float8"}),
        ("similarity", {"references": "x", "crop": "half"}),
    ],
)
def test_rewards_of_this_package_are_checked(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^options of reward {name!r}: .* must be "):
        load_reward(RewardConfig(name=name, options=options))


@pytest.mark.parametrize("content", [b"hello\n", b"", b"\x80\x02}q\x00.", b"GIF89a" * 9])
def test_files_that_are_no_weights(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "notes.pth").write_bytes(content)
    with pytest.raises(InputError, match=r"^weight file \S+notes\.pth [^\n]+$"):
        load_tensors(tmp_path / "notes.pth")


def test_a_model_that_is_no_folder_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^\S+none: is neither a folder [\w' ]+ nor a hub id$"):
        load_config(None, str(tmp_path / "none"))


def test_unknown_precision(clip_folder: Path) -> None:
    with pytest.raises(InputError, match="precision 'float8' is none of fp32, fp16, bf16"):
        ClipReward(str(clip_folder), precision="float8")


def test_loading_gives_no_alarm_about_random_weights(
    clip_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import open_clip
    import torch

    network = open_clip.create_model(f"local-dir:{clip_folder}")
    torch.save(network.state_dict(), tmp_path / "hps.pt")
    caplog.clear()
    HpsV2Reward(str(tmp_path / "hps.pt"), model=str(clip_folder))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
