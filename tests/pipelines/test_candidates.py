"""Pictures to choose from: sampled and scored once, whatever interrupts or damages them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_candidates import PROMPTS, Brightness, FakeSampler, build, metadata
from PIL import Image
from torch import Tensor

from mmalign.config import PairsBuildConfig, RewardConfig
from mmalign.data.images import save_png
from mmalign.data.schema import CHOSEN_FILE, REJECTED_FILE
from mmalign.pipelines import _candidates, pairs_build
from mmalign.pipelines.pairs_build import build_pairs
from mmalign.randomness import derive_seed
from mmalign.types import InputError


def test_nothing_is_done_twice(building: PairsBuildConfig) -> None:
    build(building)
    before = (Path(building.output) / "metadata.jsonl").read_bytes()
    adapter, reward = FakeSampler(), Brightness()
    build(building, adapter, reward)
    assert (adapter.sampled, reward.batches) == ([], [])
    assert (Path(building.output) / "metadata.jsonl").read_bytes() == before


def test_interrupted_sampling_goes_on(building: PairsBuildConfig, tmp_path: Path) -> None:
    adapter = FakeSampler()
    adapter.stop_after = 8
    with pytest.raises(KeyboardInterrupt):
        build(building, adapter)
    again = FakeSampler()
    build(building, again)
    assert adapter.sampled + again.sampled == [
        (p, derive_seed(7, p, i)) for p in PROMPTS for i in range(3)
    ]
    resumed = (Path(building.output) / "metadata.jsonl").read_bytes()
    building.output = str(tmp_path / "whole")
    build(building)
    assert (Path(building.output) / "metadata.jsonl").read_bytes() == resumed


def test_damaged_and_missing_candidates_are_sampled_and_scored_again(
    building: PairsBuildConfig,
) -> None:
    build(building)
    before = (Path(building.output) / "metadata.jsonl").read_bytes()
    first, second, *_ = sorted((Path(building.output) / "candidates").rglob("*.png"))
    first.write_bytes(first.read_bytes()[:30])
    second.unlink()
    adapter = FakeSampler()
    build(building, adapter)
    assert len(adapter.sampled) == 2
    assert (Path(building.output) / "metadata.jsonl").read_bytes() == before


def test_changed_candidate_is_scored_again(building: PairsBuildConfig) -> None:
    build(building)
    worst = Path(building.output) / metadata(building)[0][REJECTED_FILE]
    save_png(torch.ones(3, 6, 6), worst)
    reward = Brightness()
    build(building, FakeSampler(), reward)
    assert reward.batches == [[PROMPTS[0]] * 3]
    assert metadata(building)[0][CHOSEN_FILE] == str(worst.relative_to(building.output))


def test_interrupted_scoring_goes_on(
    building: PairsBuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = Brightness.__call__

    def stop(self: Brightness, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        if len(self.batches) == 2:
            raise KeyboardInterrupt
        return score(self, samples, prompts)

    monkeypatch.setattr(Brightness, "__call__", stop)  # a subclass would be another reward
    with pytest.raises(KeyboardInterrupt):
        build(building, None, Brightness())
    monkeypatch.undo()
    (log,) = (Path(building.output) / "scores").iterdir()
    with log.open("ab") as stream:
        stream.write(b'{"name": "cut off')
    reward = Brightness()
    assert len(build(building, None, reward).pairs) == 5
    assert reward.batches == [[prompt] * 3 for prompt in PROMPTS[2:]]
    assert all(json.loads(line) for line in log.read_text().splitlines())


@pytest.mark.parametrize("bad", [float("nan"), None])
def test_bad_reward_names_the_image(building: PairsBuildConfig, bad: float | None) -> None:
    class Bad(Brightness):
        def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Any:
            values: list[float | None] = [0.5] * len(prompts)
            if prompts[0] == PROMPTS[1]:
                values[2] = bad
            return values

    with pytest.raises(InputError, match=r"fake-brightness returned .* for .*/002\.png"):
        build(building, None, Bad())
    assert not (Path(building.output) / "metadata.jsonl").exists()


def test_nan_image_is_named(building: PairsBuildConfig) -> None:
    class Broken(FakeSampler):
        def sample(self, *args: Any) -> Tensor:
            return super().sample(*args) * float("nan")

    with pytest.raises(InputError, match=r"000\.png: the image has pixels that are not finite"):
        build(building, Broken())


def test_other_settings_are_not_mixed(building: PairsBuildConfig) -> None:
    build(building)
    building.sampling.batch_size = 2
    building.candidates_per_prompt = 4
    adapter = FakeSampler()
    build(building, adapter)
    assert len(adapter.sampled) == 5
    building.sampling.guidance_scale = 9.0
    with pytest.raises(
        InputError, match=r"sampling\.guidance_scale 5\.0, not 9\.0: choose another"
    ):
        build(building)


def test_retrained_adapter_of_the_same_name_is_not_mixed(
    building: PairsBuildConfig, tmp_path: Path
) -> None:
    (tmp_path / "lora").mkdir()
    weights = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    weights.write_bytes(b"one")
    building.adapter = str(tmp_path / "lora")
    build(building)
    weights.write_bytes(b"two")
    with pytest.raises(InputError, match="candidates sampled with adapter_files"):
        build(building)


def test_no_model_is_loaded_when_nothing_is_missing(
    building: PairsBuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def load(*_: Any, **options: Any) -> FakeSampler:
        calls.append(options)
        return FakeSampler()

    monkeypatch.setattr(pairs_build, "load_adapter", load)
    for _ in range(2):
        build_pairs(building, reward=Brightness())  # type: ignore[arg-type]
    assert calls == [{"device": "cpu", "for_training": False}]


def test_disk_full(building: PairsBuildConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(InputError, match=r"cannot write .*\.png: No space left on device"):
        build(building)
    monkeypatch.undo()
    assert len(build(building).pairs) == 5
    shutil.rmtree(Path(building.output) / _candidates.FOLDER)


counted: list[int] = []


def count(images: Tensor, prompts: Sequence[str]) -> Tensor:
    counted.append(len(images))
    return images.mean((1, 2, 3))


def test_scores_are_shared_with_other_runs(building: PairsBuildConfig, tmp_path: Path) -> None:
    counted.clear()
    building.rewards, building.cache = (
        [RewardConfig(name=f"{__name__}:count")],
        str(tmp_path / "cache"),
    )
    build_pairs(building, adapter=FakeSampler())  # type: ignore[arg-type]
    assert sum(counted) == 15
    before = (Path(building.output) / "metadata.jsonl").read_bytes()
    building.output = str(tmp_path / "again")
    build_pairs(building, adapter=FakeSampler())  # type: ignore[arg-type]
    assert sum(counted) == 15
    assert (Path(building.output) / "metadata.jsonl").read_bytes() == before
