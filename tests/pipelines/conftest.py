"""Pictures to label, files of benchmarks, and configurations on pictures without models."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import compared_models
import fake_candidates
import pytest
from benchmark_files import save_files
from PIL import Image
from shared_jobs import LAUNCHED, World, run, runs_here, save_data
from two_processes import in_two

from mmalign.config import EvaluateImageConfig, PairsBuildConfig
from mmalign.data.files import write_jsonl

PROMPTS = ["red", "a red", "red <b>&amp;</b>"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures of each prompt, as `mmalign generate` writes them."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rows = []
    for number, prompt in enumerate(PROMPTS):
        for index in range(2):
            name = f"{number}-{index}.png"
            Image.new("RGB", (16, 16), (80 * number, 200 * index, 0)).save(pictures / name)
            rows.append({"file_name": name, "prompt": prompt})
    write_jsonl(pictures / "metadata.jsonl", rows)
    return pictures


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pauses: None) -> Path:
    """The working directory, with answers and labels of every hallucination benchmark."""
    monkeypatch.chdir(tmp_path)
    return save_files(tmp_path)


@pytest.fixture
def building(tmp_path: Path) -> PairsBuildConfig:
    """Three pictures of each prompt, to be sampled for pairs."""
    return fake_candidates.configure(tmp_path)


@pytest.fixture
def comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvaluateImageConfig:
    """A model before and after an adapter that makes its pictures brighter."""
    return compared_models.configure(tmp_path, monkeypatch)


@pytest.fixture
def several(comparison: EvaluateImageConfig, tmp_path: Path) -> EvaluateImageConfig:
    """Base, two adapters of different strength, and a folder of dark pictures."""
    comparison.adapter = None
    comparison.subjects = compared_models.list_several(tmp_path)
    return comparison


@pytest.fixture(scope="module")
def world(
    tiny_sd: Path,
    tiny_lcm: Path,
    vlm: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> World:
    """Pairs of noise pictures with scores, answers about them, and prompts."""
    folder = tmp_path_factory.mktemp("world")
    save_data(folder)
    return World(folder, tiny_sd, tiny_lcm, vlm("llava"))


@pytest.fixture(scope="module")
def two(world: World, request: pytest.FixtureRequest) -> Path:
    """The file's `NAMES`, or those that a selected test looks at, by two processes started once."""
    folder = world.folder / "two"
    here = [item for item in request.session.items if item.path == request.path]
    chosen = [getattr(item, "callspec", None) for item in here]
    named = {call.params["name"] for call in chosen if call is not None}
    names = [
        name
        for name in request.module.NAMES
        if (None in chosen or name in named) and runs_here(name)
    ]

    def everything() -> None:
        for name in names:
            for variable, part in LAUNCHED.items():
                os.environ[variable] = str(part in name).lower()
            run(name, world, folder / name, 2)

    ended = in_two(everything, folder, timeout=280)
    assert ended.codes == [0, 0], "\n".join(text[-2000:] for text in ended.output)
    return folder
