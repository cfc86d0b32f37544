from __future__ import annotations

import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from mmalign.config import PairsConfig
from mmalign.data import cache
from mmalign.data.cache import CachedPairs, EncodedPair, LivePairs, precompute
from mmalign.data.readers import read_pairs
from mmalign.types import InputError, LatentMoments, PreferencePair

Make = Callable[..., Path]
Pairs = list[PreferencePair]


def settings(path: Path, **options: Any) -> PairsConfig:
    return PairsConfig(path=str(path), **{"resolution": 8, **options})


def assert_equal(first: EncodedPair, second: EncodedPair) -> None:
    assert first._replace(condition={})[:2] == second[:2]
    for name in ("chosen_mean", "chosen_std", "rejected_mean", "rejected_std"):
        a, b = getattr(first, name), getattr(second, name)
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, b)
    assert first.condition.keys() == second.condition.keys()
    for name, tensor in first.condition.items():
        assert torch.equal(tensor, second.condition[name])
    assert first.margin == second.margin


@pytest.mark.parametrize("flip", [False, True])
def test_cached_equals_live_bitwise(
    imagefolder: Make, fake_adapter: Any, tmp_path: Path, flip: bool
) -> None:
    config = settings(imagefolder(row1={"score_chosen": 3, "score_rejected": 1}), random_flip=flip)
    pairs = read_pairs(config).pairs
    live = LivePairs(pairs, fake_adapter, config)
    cached = precompute(pairs, fake_adapter, config, tmp_path / "cache")
    assert len(live) == len(cached) == 3
    for index in range(3):
        assert_equal(live[index], cached[index])
    views = 2 if flip else 1
    assert cached[0].chosen_mean.shape == (views, 4, 2, 2)
    assert cached[0].condition["prompt_embeds"].shape == (5, 3)
    assert cached.empty_condition.keys() == live.empty_condition.keys()
    assert torch.equal(
        cached.empty_condition["prompt_embeds"], live.empty_condition["prompt_embeds"]
    )
    for attribute in ("prompts", "pair_ids", "margins", "scores"):
        assert getattr(live, attribute) == getattr(cached, attribute)
    assert cached.margins == [None, 2, None]
    assert cached.scores[1] == (3, 1)


def test_mirrored_view(imagefolder: Make, fake_adapter: Any) -> None:
    config = settings(imagefolder(), random_flip=True)

    class Pixels(type(fake_adapter)):  # type: ignore[misc]
        def encode_images(self, images: torch.Tensor) -> LatentMoments:
            return LatentMoments(images, images * 0)

    pair = LivePairs(read_pairs(config).pairs, Pixels(), config)[0]
    assert torch.equal(pair.chosen_mean[1], pair.chosen_mean[0].flip(-1))
    assert not torch.equal(pair.chosen_mean[1], pair.chosen_mean[0])


def test_each_image_and_prompt_is_encoded_once(
    imagefolder: Make, fake_adapter: Any, tmp_path: Path
) -> None:
    again = {"prompt": "prompt 0", "chosen_file_name": "0_0.png"}
    config = settings(imagefolder(4, row1=again))
    pairs = read_pairs(config).pairs
    first = precompute(pairs, fake_adapter, config, tmp_path / "cache")
    assert (fake_adapter.calls.images, fake_adapter.calls.prompts) == (7, 4)
    second = precompute(pairs, fake_adapter, config, tmp_path / "cache")
    assert (fake_adapter.calls.images, fake_adapter.calls.prompts) == (7, 4)
    for index in range(4):
        assert_equal(first[index], second[index])


@pytest.mark.parametrize("change", ["fingerprint", "resolution", "random_flip", "content"])
def test_other_model_or_preprocessing_or_image_is_encoded_again(
    imagefolder: Make, fake_adapter: Any, tmp_path: Path, png: Callable[..., bytes], change: str
) -> None:
    folder = imagefolder(2)
    config = settings(folder)
    precompute(read_pairs(config).pairs, fake_adapter, config, tmp_path / "cache")
    before = fake_adapter.calls.images
    if change == "fingerprint":
        fake_adapter.fingerprint = "fake-2"
    elif change == "content":
        (folder / "1_0.png").write_bytes(png(77))
    else:
        config = settings(folder, **{change: 12 if change == "resolution" else True})
    pairs = read_pairs(config).pairs
    cached = precompute(pairs, fake_adapter, config, tmp_path / "cache")
    expected = {"fingerprint": 4, "resolution": 4, "random_flip": 8, "content": 1}[change]
    assert fake_adapter.calls.images - before == expected
    assert_equal(LivePairs(pairs, fake_adapter, config)[1], cached[1])


def test_interrupted_run_goes_on(
    imagefolder: Make, fake_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SHARD_ENTRIES", 4)
    config = settings(imagefolder(5))
    pairs = read_pairs(config).pairs
    encode = fake_adapter.encode_images

    def stop_at_the_seventh(images: torch.Tensor) -> LatentMoments:
        if fake_adapter.calls.images == 6:
            raise KeyboardInterrupt
        moments: LatentMoments = encode(images)
        return moments

    fake_adapter.encode_images = stop_at_the_seventh
    with pytest.raises(KeyboardInterrupt):
        precompute(pairs, fake_adapter, config, tmp_path / "cache")
    fake_adapter.encode_images = encode
    fake_adapter.calls.images = 0
    cached = precompute(pairs, fake_adapter, config, tmp_path / "cache")
    assert fake_adapter.calls.images == 6  # 10 images, of which the first shard of 4 was saved
    for index in range(5):
        assert_equal(LivePairs(pairs, fake_adapter, config)[index], cached[index])


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "index"])
def test_damaged_shard_is_computed_again(
    imagefolder: Make,
    fake_adapter: Any,
    tmp_path: Path,
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(cache, "SHARD_ENTRIES", 4)
    config = settings(imagefolder(4))
    pairs = read_pairs(config).pairs
    whole = precompute(pairs, fake_adapter, config, tmp_path / "cache")
    expected = [whole[index] for index in range(4)]
    shard = sorted((tmp_path / "cache").rglob("images-*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    if damage == "cut":
        shard.write_bytes(data[:-10])
    elif damage == "flip":
        data[-3] ^= 1
        shard.write_bytes(data)
    elif damage == "gone":
        shard.unlink()
    else:
        shard.with_suffix(".json").write_text('{"hash": "x"')
    fake_adapter.calls.images = 0
    again = precompute(pairs, fake_adapter, config, tmp_path / "cache")
    assert fake_adapter.calls.images == 4
    assert "is damaged and is computed again" in caplog.text
    for index in range(4):
        assert_equal(expected[index], again[index])


def test_two_processes_may_write_the_same_cache(
    imagefolder: Make, fake_adapter: Any, tmp_path: Path
) -> None:
    config = settings(imagefolder(3))
    pairs = read_pairs(config).pairs
    precompute(pairs, fake_adapter, config, tmp_path / "a")
    precompute(pairs, fake_adapter, config, tmp_path / "b")
    files = [sorted(p.name for p in (tmp_path / x).rglob("*.*")) for x in "ab"]
    assert files[0] == files[1]
    assert len(files[0]) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers(imagefolder: Make, fake_adapter: Any, tmp_path: Path, workers: int) -> None:
    config = settings(imagefolder(6))
    pairs = read_pairs(config).pairs
    cached = precompute(pairs, fake_adapter, config, tmp_path / "cache")
    _ = cached[0]
    loader: Any = DataLoader(
        cached,  # type: ignore[arg-type]
        batch_size=2,
        num_workers=workers,
        collate_fn=list,
    )
    items = [item for batch in loader for item in batch]
    for index, item in enumerate(items):
        assert_equal(item, cached[index])
    assert_equal(pickle.loads(pickle.dumps(cached))[3], cached[3])


def truncate(file: Path) -> None:
    from PIL import Image

    Image.effect_noise((300, 300), 50).save(file, format="JPEG")
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def test_undecodable_image_stops(imagefolder: Make, fake_adapter: Any, tmp_path: Path) -> None:
    folder = imagefolder()
    truncate(folder / "1_1.png")
    config = settings(folder)
    pairs = read_pairs(config).pairs
    with pytest.raises(InputError, match=r"line 2, rejected: 1_1\.png: .*truncated"):
        precompute(pairs, fake_adapter, config, tmp_path / "cache")
    live = LivePairs(pairs, fake_adapter, config)
    with pytest.raises(InputError, match=r"line 2, rejected: 1_1\.png: .*truncated"):
        live[1]


def test_undecodable_image_is_skipped(
    imagefolder: Make, fake_adapter: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = imagefolder()
    truncate(folder / "1_1.png")
    config = settings(folder, on_bad_row="skip")
    pairs = read_pairs(config).pairs
    assert len(pairs) == 3
    both: list[LivePairs | CachedPairs] = [
        LivePairs(pairs, fake_adapter, config),
        precompute(pairs, fake_adapter, config, tmp_path / "cache"),
    ]
    for encoded in both:
        assert encoded.prompts == ["prompt 0", "prompt 2"]
        assert encoded[1].prompt == "prompt 2"
    assert_equal(both[0][1], both[1][1])
    assert caplog.text.count("1 of 3 pairs skipped, among them: ") == 2


def test_nothing_left(imagefolder: Make, fake_adapter: Any, tmp_path: Path) -> None:
    folder = imagefolder(1)
    truncate(folder / "0_0.png")
    config = settings(folder, on_bad_row="skip")
    with pytest.raises(InputError, match="no pair is left"):
        precompute(read_pairs(config).pairs, fake_adapter, config, tmp_path / "cache")


def test_nan_latents_name_the_image(imagefolder: Make, fake_adapter: Any, tmp_path: Path) -> None:
    config = settings(imagefolder(), on_bad_row="skip")
    fake_adapter.weight[0] = float("nan")
    pairs = read_pairs(config).pairs
    with pytest.raises(InputError, match=r"line 1, chosen: 0_0\.png: the autoencoder .*float32"):
        precompute(pairs, fake_adapter, config, tmp_path / "cache")


def test_unwritable_cache(imagefolder: Make, fake_adapter: Any, tmp_path: Path) -> None:
    config = settings(imagefolder())
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot write .*images-"):
        precompute(read_pairs(config).pairs, fake_adapter, config, tmp_path / "file")


def test_cache_removed_meanwhile(imagefolder: Make, fake_adapter: Any, tmp_path: Path) -> None:
    config = settings(imagefolder())
    cached = precompute(read_pairs(config).pairs, fake_adapter, config, tmp_path / "cache")
    copy = pickle.loads(pickle.dumps(cached))
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(InputError, match=r"cache .*safetensors cannot be read"):
        copy[0]


def test_training_needs_no_images_once_cached(
    imagefolder: Make, fake_adapter: Any, tmp_path: Path
) -> None:
    folder = imagefolder()
    config = settings(folder)
    cached = precompute(read_pairs(config).pairs, fake_adapter, config, tmp_path / "cache")
    shutil.rmtree(folder)
    assert cached[2].prompt == "prompt 2"


def test_index_is_readable(
    imagefolder: Make, fake_adapter: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    config = settings(imagefolder(2))
    cached = precompute(read_pairs(config).pairs, fake_adapter, config, tmp_path / "cache")
    (index,) = (tmp_path / "cache").rglob("images-*.json")
    entries = json.loads(index.read_text())["entries"]
    assert entries[0] == cached.infos[0].chosen_hash.hex()
    assert not caplog.records
