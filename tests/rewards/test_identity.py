"""What a score depends on: whatever may change it must change the description."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmalign.config import RewardConfig
from mmalign.rewards import load_reward
from mmalign.rewards._identity import reward_identity


def by_brightness(images: Any, prompts: Any, **options: Any) -> Any:
    return images.mean((1, 2, 3))


def identity(name: str, **options: Any) -> str:
    config = RewardConfig(name=name, options=options)
    return json.dumps(reward_identity(config, load_reward(config)), sort_keys=True)


def test_name_and_options_count_and_nothing_else() -> None:
    assert identity("brightness") == identity("brightness")
    named = {identity("brightness"), identity("saturation"), identity("jpeg")}
    assert len(named | {identity("jpeg", direction="incompressibility")}) == 4
    config = RewardConfig(name="brightness", weight=3.0, normalize="zscore", batch_size=2)
    assert json.dumps(reward_identity(config, load_reward(config)), sort_keys=True) == identity(
        "brightness"
    )


def test_weights_count_by_their_contents(clip_folder: Path, tmp_path: Path) -> None:
    for file in clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    before = identity("clip", model=f"local-dir:{tmp_path}")
    assert identity("clip", model=f"local-dir:{tmp_path}") == before
    weights = tmp_path / "open_clip_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert identity("clip", model=f"local-dir:{tmp_path}") != before


def test_a_default_model_counts_as_if_it_were_named() -> None:
    config = RewardConfig(name="clip")
    described = reward_identity(config, load_reward(config))
    assert described is not None
    assert described["files"]["pkg://mmalign.shapes/models/clip"]


def test_programs_count_by_their_contents(tmp_path: Path) -> None:
    program = tmp_path / "scorer.py"
    program.write_text("import sys\nfor line in sys.stdin: pass\n")
    before = identity("command", command=["python3", str(program)])
    program.write_text("import sys\nfor line in sys.stdin: print(line)\n")
    assert identity("command", command=["python3", str(program)]) != before


def test_functions_count_by_their_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert identity(f"{__name__}:by_brightness") != identity(f"{__name__}:by_brightness", x=1)
    config = RewardConfig(name=f"{__name__}:by_brightness")
    described = reward_identity(config, load_reward(config))
    assert described is not None
    assert described["code"]
    other = RewardConfig(name="brightness")
    assert described["code"] != (reward_identity(other, load_reward(other)) or {})["code"]


def test_a_repository_of_the_hub_counts_by_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    reference = tmp_path / "models--org--name" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    config = RewardConfig(name="brightness", options={"model": "hf-hub:org/name"})
    reward = load_reward(RewardConfig(name="brightness"))
    found = []
    for commit in ("1" * 40, "2" * 40):
        reference.write_text(commit)
        found.append((reward_identity(config, reward) or {})["files"])
    assert found == [{"hf-hub:org/name": "1" * 40}, {"hf-hub:org/name": "2" * 40}]


def test_people_may_change_their_minds(tmp_path: Path) -> None:
    config = RewardConfig(name="people", options={"folder": str(tmp_path / "people")})
    assert reward_identity(config, load_reward(config)) is None


def test_a_server_counts_only_with_a_revision() -> None:
    options = {"url": "http://127.0.0.1:9/"}
    config = RewardConfig(name="http", options=options)
    assert reward_identity(config, load_reward(config)) is None
    assert identity("http", **options, revision="1") != identity("http", **options, revision="2")
