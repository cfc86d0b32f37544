"""The documented example aligns a model of sounds, and rewards say what they score."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from mmalign.config import RewardConfig
from mmalign.rewards import load_reward
from mmalign.types import InputError, Reward

_spec = importlib.util.spec_from_file_location(
    "audio_benchmark", Path(__file__).parents[1] / "benchmarks" / "audio.py"
)
assert _spec is not None
assert _spec.loader is not None
benchmark = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(benchmark)


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    found: dict[str, Any] = benchmark.load_example()
    return found


def test_notes_are_spectrograms_of_one_pitch(example: dict[str, Any]) -> None:
    sounds = example["random_notes"](8, torch.Generator().manual_seed(0))
    assert sounds.shape == (8, 1, 16, 16)
    assert float(sounds.min()) == -1.0
    assert 0.9 < float(sounds.max()) < 1.1
    loudest = sounds[:, 0, :, 1:-1].argmax(1)
    assert bool((loudest.amax(1) - loudest.amin(1) <= 1).all())


def test_reward_is_the_share_of_low_bands(example: dict[str, Any]) -> None:
    """A band is half a cycle in 16; a note at the border has half of its loudness below it."""
    pitches = torch.tensor([2 / 32, 7.5 / 32, 14 / 32])
    notes = example["record"](pitches)
    scores = example["LowPitch"]()(notes, [""] * 3)
    torch.testing.assert_close(scores, torch.tensor([1.0, 0.5, 0.0]), rtol=0, atol=0.03)
    louder = notes.clone()
    louder[2, 0, 0, 0] = 5.0  # in one of 16 frames, as loud as the loudest note at most
    bounded = float(example["LowPitch"]()(louder, [""] * 3)[2])
    assert 0 < bounded - float(scores[2]) < 1 / 16


def test_rewards_of_sounds_and_of_pictures_are_kept_apart(
    example: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("sounds")
    module.LowPitch = example["LowPitch"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sounds", module)
    config = RewardConfig(name="sounds:LowPitch")
    assert isinstance(load_reward(config, modality="audio"), Reward)
    with pytest.raises(InputError, match="'sounds:LowPitch' scores sounds, not images"):
        load_reward(config)
    with pytest.raises(InputError, match="'brightness' scores images, not sounds"):
        load_reward(RewardConfig(name="brightness"), modality="audio")


def test_alignment_raises_the_reward(example: dict[str, Any]) -> None:
    """Shorter than the page's run."""
    reward = example["LowPitch"]()
    model = example["train_base"](seed=0, steps=40)
    _, before = example["measure"](model, reward, 32)
    example["align"](model, reward, seed=0, steps=8, kl_weight=0.0)
    _, after = example["measure"](model, reward, 32)
    assert after["reward"] > before["reward"] + 0.05
