"""Vision-language checkpoints that cannot be used, and what a fingerprint covers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from vlm_models import edited

from mmalign.adapters import load_vlm
from mmalign.config import VlmModelConfig
from mmalign.types import (
    InputError,
)


def test_unusable_checkpoints_are_one_line(vlm: Callable[[str], Path], tmp_path: Path) -> None:
    source = vlm("llava")
    without = tmp_path / "without"
    shutil.copytree(source, without)
    (without / "chat_template.jinja").unlink()
    foreign = tmp_path / "foreign"
    shutil.copytree(source, foreign)
    (foreign / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    pickled = tmp_path / "pickled"
    shutil.copytree(source, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    cases = {
        without: "has no chat template",
        foreign: "its chat template",
        edited(source, tmp_path / "type", "config.json", model_type="gpt2"): "model_type 'gpt2'",
        pickled: "only pickled weights",
        tmp_path / "missing": "no such folder",
    }
    for folder, problem in cases.items():
        with pytest.raises(InputError, match=problem) as caught:
            load_vlm(VlmModelConfig(model=str(folder), offline=True), "cpu")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="family is llava, not qwen_vl"):
        load_vlm(VlmModelConfig(model=str(source), family="qwen_vl"), "cpu")


def test_fingerprint_follows_settings_of_the_model(
    vlm: Callable[[str], Path], tmp_path: Path
) -> None:
    def fingerprint(folder: Path) -> str:
        return load_vlm(VlmModelConfig(model=str(folder), offline=True), "cpu").fingerprint

    source = vlm("llava")
    text = json.loads((source / "config.json").read_text())["text_config"]
    same = edited(source, tmp_path / "same", "config.json", transformers_version="5.0.0")
    other = edited(
        source, tmp_path / "other", "config.json", text_config={**text, "rms_norm_eps": 0.1}
    )
    assert fingerprint(same) == fingerprint(source)
    assert fingerprint(other) != fingerprint(source)


def test_fingerprint_follows_weights_and_template(
    vlm: Callable[[str], Path], tmp_path: Path
) -> None:
    def fingerprint(folder: Path) -> str:
        return load_vlm(VlmModelConfig(model=str(folder), offline=True), "cpu").fingerprint

    source = vlm("llava")
    other = tmp_path / "template"
    shutil.copytree(source, other)
    text = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").write_text(text.replace("': '", "' - '").replace("T:", "T -"))
    assert fingerprint(source) == fingerprint(source)
    assert fingerprint(source) != fingerprint(other)
