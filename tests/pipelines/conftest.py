"""Pictures to label, files of benchmarks, and configurations on pictures without models."""

from __future__ import annotations

from pathlib import Path

import compared_models
import fake_candidates
import pytest
from benchmark_files import save_files
from PIL import Image

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
