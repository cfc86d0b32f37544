from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmalign.rewards.pickscore import PickScoreReward
from mmalign.types import InputError, Reward

from reward_zoo import (  # isort: skip
    PHOTOS,
    PROMPTS,
    as_images,
    as_tensor,
    check_gradients,
    eight_bit,
    levels,
    photo,
    save_clip,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("pickscore"))


def authors_scores(folder: Path, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """PickScore as its paper defines it, through transformers' own classes and PIL images."""
    model = CLIPModel.from_pretrained(folder).eval()
    pictures = CLIPImageProcessorPil.from_pretrained(folder)(as_images(images), return_tensors="pt")
    words = AutoTokenizer.from_pretrained(folder)(
        prompts, padding=True, truncation=True, max_length=24, return_tensors="pt"
    )
    with torch.no_grad():
        output = model(**words, **pictures)
    return output.logits_per_image.diagonal()


def test_equals_transformers(folder: Path) -> None:
    reward = PickScoreReward(str(folder))
    images = eight_bit(3, 3, 32, 32)
    scores = reward(images, PROMPTS)
    assert isinstance(reward, Reward)
    assert scores.std() > 0.5
    expected = authors_scores(folder, images, PROMPTS)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)  # of up to 100
    assert reward.range == pytest.approx((-100, 100), rel=1e-4)


def test_does_not_depend_on_the_batch(folder: Path) -> None:
    reward = PickScoreReward(str(folder))
    images = eight_bit(3, 3, 40, 33)
    together = reward(images, PROMPTS)
    alone = [reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-4)


def test_long_prompts_are_cut(folder: Path) -> None:
    reward = PickScoreReward(str(folder))
    images = eight_bit(1, 3, 32, 32)
    long = "a red circle left of a blue square " * 20
    torch.testing.assert_close(reward(images, [long]), authors_scores(folder, images, [long]))


def test_gradients_reach_the_image(folder: Path) -> None:
    reward = PickScoreReward(str(folder), dtype="float64")
    check_gradients(lambda images: reward(images, [PROMPTS[0]]), 1, 3, 19, 24)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(folder: Path, dtype: str) -> None:
    images = eight_bit(3, 3, 32, 32)
    exact = PickScoreReward(str(folder))(images, PROMPTS)
    scores = PickScoreReward(str(folder), dtype=dtype)(images, PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, exact, rtol=0, atol=3)


@pytest.mark.parametrize("name", PHOTOS)
def test_preprocessing_equals_pillow_on_photographs(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = save_clip(tmp_path_factory.getbasetemp() / "clip224", size=224)
    reward = PickScoreReward(str(folder))
    for image in (photo(name), photo(name).rotate(90, expand=True)):
        theirs = CLIPImageProcessorPil()(image, return_tensors="pt")["pixel_values"]
        ours = reward.clip.preprocess(as_tensor(image))
        assert levels(ours, theirs, reward.clip.preprocess.std) <= 1.001


def test_processor_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    bare = save_clip(tmp_path / "bare", processor=False)
    with pytest.raises(InputError, match="has no files of a tokenizer"):
        PickScoreReward(str(bare))
    images = eight_bit(3, 3, 32, 32)
    reward = PickScoreReward(str(bare), processor=str(folder))
    assert torch.equal(reward(images, PROMPTS), PickScoreReward(str(folder))(images, PROMPTS))


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    folder = save_clip(tmp_path)
    model = CLIPModel.from_pretrained(folder)
    model.vision_model.save_pretrained(folder)  # half of the network under other names
    CLIPModel(model.config).config.save_pretrained(folder)
    with pytest.raises(InputError, match=r"not a checkpoint of CLIPModel: \d+ weights are missing"):
        PickScoreReward(str(folder))


def test_pickled_weights_are_refused(tmp_path: Path, exploit: Any) -> None:
    folder = save_clip(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save(exploit, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="only pickled weights, which are never loaded"):
        PickScoreReward(str(folder))
    assert not exploit.marker.exists()


def test_neither_folder_nor_hub_id() -> None:
    with pytest.raises(InputError, match="neither a folder in transformers' format nor a hub id"):
        PickScoreReward("/nowhere/pickscore")


def test_unknown_dtype(folder: Path) -> None:
    with pytest.raises(InputError, match="dtype 'int8' is none of float32"):
        PickScoreReward(str(folder), dtype="int8")
