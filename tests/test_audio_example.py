"""The documented example aligns a model of sounds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

DOCUMENT = Path(__file__).parents[1] / "docs" / "audio.md"


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)
    content: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, str(DOCUMENT), "exec"), content)
    return content


def test_reward_of_known_notes(example: dict[str, Any]) -> None:
    """Loud in one band only: the reward is minus that band's pitch."""
    sounds = torch.full((2, 1, 16, 16), -1.0)
    sounds[0, :, 0], sounds[1, :, 15] = 1.0, 1.0
    low, high = example["LowPitch"]()(sounds, ["", ""]).tolist()
    assert low == pytest.approx(0.0, abs=0.01)
    assert high == pytest.approx(-1.0, abs=0.01)


def test_notes_are_spectrograms_of_one_pitch(example: dict[str, Any]) -> None:
    torch.manual_seed(0)
    sounds = example["notes"](8)
    assert sounds.shape == (8, 1, 16, 16)
    assert float(sounds.abs().max()) <= 1.2
    loudest = sounds[:, 0, :, 1:-1].argmax(1)
    assert bool((loudest.amax(1) - loudest.amin(1) <= 1).all())


def test_alignment_raises_the_reward(example: dict[str, Any]) -> None:
    before, after = example["main"](base_steps=80, align_steps=15)
    assert after > before + 0.03
