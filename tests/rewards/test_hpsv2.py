from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from mmalign.rewards.hpsv2 import FILES, HpsV2Reward
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
)


@pytest.fixture(scope="module")
def checkpoints(clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both versions as published: a state dict among other things in a file of torch."""
    folder = tmp_path_factory.mktemp("hpsv2")
    for seed, name in enumerate(FILES.values(), 5):
        model = _network(clip_folder)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        torch.save({"epoch": 1, "name": "x", "state_dict": model.state_dict()}, folder / name)
    return folder


def _network(clip_folder: Path) -> Any:
    return open_clip.create_model(f"local-dir:{clip_folder}").eval()


def authors_image(image: Image.Image, size: int, mean: Any, std: Any) -> torch.Tensor:
    """Long side to `size`, padded with black around, as the authors describe it, on PIL images."""
    scale = size / max(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = TF.resize(image, [height, width], InterpolationMode.BICUBIC)
    left, top = (size - width) // 2, (size - height) // 2
    image = TF.pad(image, [left, top, size - width - left, size - height - top], fill=0)
    return TF.normalize(TF.to_tensor(image), mean, std)


@pytest.mark.parametrize("version", FILES)
def test_equals_the_authors_definition(version: Any, clip_folder: Path, checkpoints: Path) -> None:
    reward = HpsV2Reward(str(checkpoints), version, str(clip_folder))
    model = _network(clip_folder)
    model.load_state_dict(torch.load(checkpoints / FILES[version], weights_only=True)["state_dict"])
    images = eight_bit(3, 3, 24, 15)
    pixels = [authors_image(i, 16, [0.5] * 3, [0.25] * 3) for i in as_images(images)]
    tokens = open_clip.get_tokenizer(f"local-dir:{clip_folder}")(PROMPTS)
    with torch.no_grad():
        expected = F.cosine_similarity(
            model.encode_image(reward.clip.preprocess(images)), model.encode_text(tokens)
        )
    assert levels(reward.clip.preprocess(images), torch.stack(pixels), [0.25] * 3) <= 1.001
    scores = reward(images, PROMPTS)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    assert scores.std() > 0.01
    assert isinstance(reward, Reward)


def test_versions_are_different_files(clip_folder: Path, checkpoints: Path) -> None:
    images = eight_bit(3, 3, 16, 16)
    old, new = (HpsV2Reward(str(checkpoints), v, str(clip_folder)) for v in ("v2.0", "v2.1"))
    assert not torch.allclose(old(images, PROMPTS), new(images, PROMPTS))
    file = HpsV2Reward(str(checkpoints / FILES["v2.1"]), model=str(clip_folder))
    assert torch.equal(file(images, PROMPTS), new(images, PROMPTS))


@pytest.mark.parametrize("name", PHOTOS)
def test_preprocessing_equals_pillow_on_photographs(
    name: str, clip_folder: Path, checkpoints: Path
) -> None:
    preprocess = HpsV2Reward(str(checkpoints), model=str(clip_folder)).clip.preprocess
    for image in (photo(name), photo(name).rotate(90, expand=True)):
        for size in (16, 224):
            ours = type(preprocess)(**{**vars(preprocess), "size": (size, size)})(as_tensor(image))
            theirs = authors_image(image, size, preprocess.mean, preprocess.std)
            assert levels(ours, theirs[None], preprocess.std) <= 1.001


def test_gradients_reach_the_image(clip_folder: Path, checkpoints: Path) -> None:
    reward = HpsV2Reward(str(checkpoints), model=str(clip_folder))
    reward.clip.model.double()
    check_gradients(lambda images: reward(images, [PROMPTS[0]]), 1, 3, 7, 9)


def test_half_precision(clip_folder: Path, checkpoints: Path) -> None:
    images = eight_bit(3, 3, 16, 16)
    exact = HpsV2Reward(str(checkpoints), model=str(clip_folder))(images, PROMPTS)
    half = HpsV2Reward(str(checkpoints), model=str(clip_folder), precision="pure_bf16")
    torch.testing.assert_close(half(images, PROMPTS).float(), exact, rtol=0, atol=0.05)


def test_checkpoint_of_another_network(clip_folder: Path, tmp_path: Path) -> None:
    state = _network(clip_folder).state_dict()
    torch.save({"state_dict": {**state, "extra.weight": torch.zeros(1)}}, tmp_path / "hps.pt")
    with pytest.raises(InputError, match=r"hps\.pt .* has unknown extra\.weight"):
        HpsV2Reward(str(tmp_path / "hps.pt"), model=str(clip_folder))
    del state["logit_scale"]
    torch.save({"state_dict": state}, tmp_path / "hps.pt")
    with pytest.raises(InputError, match="lacks logit_scale"):
        HpsV2Reward(str(tmp_path / "hps.pt"), model=str(clip_folder))


def test_pickled_checkpoint_is_refused(clip_folder: Path, tmp_path: Path, exploit: Any) -> None:
    torch.save({"state_dict": exploit}, tmp_path / FILES["v2.1"])
    with pytest.raises(InputError, match="pickled objects, which are never loaded"):
        HpsV2Reward(str(tmp_path), model=str(clip_folder))
    assert not exploit.marker.exists()


def test_bad_version_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'v3' is not v2\.0 or v2\.1"):
        HpsV2Reward(str(tmp_path), "v3")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"has no HPS_v2\.1_compressed\.pt"):
        HpsV2Reward(str(tmp_path))
    with pytest.raises(InputError, match="no such file, folder or hub id"):
        HpsV2Reward("/nowhere/hps.pt")
