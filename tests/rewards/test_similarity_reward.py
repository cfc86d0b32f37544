from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import functional as TF
from transformers import BitImageProcessor, CLIPModel, Dinov2Config, Dinov2Model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmalign.rewards.similarity import SimilarityReward
from mmalign.types import InputError, Reward

from reward_zoo import (  # isort: skip
    PHOTOS,
    as_images,
    as_tensor,
    check_gradients,
    convolutions,
    eight_bit,
    levels,
    photo,
    save_clip,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("references")
    for name in ("chelsea", "coffee"):
        photo(name).resize((48, 40)).save(folder / f"{name}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Resizes to more than it crops, as DINOv2 does (256 and 224)."""
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = Dinov2Model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 33},
        crop_size={"height": 28, "width": 28},
        image_mean=list(MEAN),
        image_std=list(STD),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    features = convolutions(torchvision.models.vgg19)
    path = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    torch.save({f"features.{key}": value for key, value in features.state_dict().items()}, path)
    return path


def pictures(references: Path) -> list[Image.Image]:
    return [Image.open(references / f"{name}.png") for name in ("chelsea", "coffee")]


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_subject_equals_transformers_clip(clip: Path, references: Path, reduce: Any) -> None:
    reward = SimilarityReward(str(references), model=str(clip), reduce=reduce)
    images = eight_bit(3, 3, 32, 32)
    processor, model = CLIPImageProcessorPil.from_pretrained(clip), CLIPModel.from_pretrained(clip)
    own = as_images(images)
    with torch.no_grad():
        pixels = [processor(i, return_tensors="pt")["pixel_values"] for i in own]
        pixels += [reward_pixels(clip, image) for image in pictures(references)]
        vectors = model.eval().get_image_features(torch.cat(pixels)).pooler_output
    table = F.cosine_similarity(vectors[:3, None], vectors[None, 3:], dim=2)
    expected = table.mean(1) if reduce == "mean" else table.max(1).values
    torch.testing.assert_close(reward(images, [""] * 3), expected, rtol=0, atol=1e-5)
    assert isinstance(reward, Reward)
    assert reward.range == (-1.0, 1.0)


def reward_pixels(folder: Path, image: Image.Image) -> torch.Tensor:
    """The reference as our tensor path sees it, which is within 1/255 of the original."""
    from mmalign.rewards._pretrained import load_preprocess

    return load_preprocess(str(folder))(as_tensor(image))


def test_subject_equals_transformers_dino(dino: Path, references: Path) -> None:
    reward = SimilarityReward(str(references / "coffee.png"), model=str(dino))
    images = torch.cat([eight_bit(1, 3, 33, 33), torch.zeros(1, 3, 33, 33)])
    pixels = BitImageProcessorPil.from_pretrained(dino)(as_images(images), return_tensors="pt")
    model = Dinov2Model.from_pretrained(dino).eval()
    with torch.no_grad():
        own = model(**pixels).pooler_output
        other = model(reward_pixels(dino, pictures(references)[1])).pooler_output
    expected = F.cosine_similarity(own, other)
    torch.testing.assert_close(reward(images, ["", ""]), expected, rtol=0, atol=1e-5)
    assert expected.std() > 1e-3


@pytest.mark.parametrize("name", PHOTOS)
def test_preprocessing_equals_pillow_on_photographs(name: str, dino: Path) -> None:
    processor = BitImageProcessorPil.from_pretrained(dino)
    for image in (photo(name), photo(name).rotate(90, expand=True)):
        theirs = processor(image, return_tensors="pt")["pixel_values"]
        assert levels(reward_pixels(dino, image), theirs, STD) <= 1.001


def test_a_reference_is_most_like_itself(dino: Path, references: Path) -> None:
    reward = SimilarityReward(str(references), model=str(dino), reduce="max")
    image = as_tensor(pictures(references)[0])
    torch.testing.assert_close(reward(image, [""]), torch.ones(1))


def test_style_equals_gatys(vgg: Path, references: Path) -> None:
    reward = SimilarityReward(str(references), "style", str(vgg), size=40)
    images = eight_bit(2, 3, 40, 40)
    features = convolutions(torchvision.models.vgg19)

    def grams(image: torch.Tensor) -> list[torch.Tensor]:
        x, found, wanted = TF.normalize(image, MEAN, STD)[None], [], True
        for layer in features[:30]:  # the first rectifier of all, and after every pooling
            x = layer(x)
            if isinstance(layer, torch.nn.ReLU) and wanted:
                rows = x[0].flatten(1)
                found.append(rows @ rows.T / rows.shape[1])
                wanted = False
            elif isinstance(layer, torch.nn.MaxPool2d):
                wanted = True
        return found

    cropped = [TF.center_crop(image, [40, 40]) for image in pictures(references)]
    with torch.no_grad():
        others = [grams(TF.to_tensor(image)) for image in cropped]
        expected = []
        for image in images:
            own = grams(image)
            assert [len(g) for g in own] == [64, 128, 256, 512, 512]
            losses = [
                sum(((a - b) ** 2).sum() / (4 * len(a) ** 2) for a, b in zip(own, o, strict=True))
                for o in others
            ]
            expected.append(-sum(losses) / 5 / len(losses))
    scores = reward(images, ["", ""])
    torch.testing.assert_close(scores, torch.stack(expected), rtol=0, atol=1e-5)
    assert reward.range[1] == 0


def test_style_gradients(vgg: Path, references: Path) -> None:
    reward = SimilarityReward(str(references), "style", str(vgg), size=32, dtype="float64")
    check_gradients(lambda images: reward(images, [""]), 1, 3, 33, 36)


def test_subject_gradients_and_half_precision(dino: Path, references: Path) -> None:
    reward = SimilarityReward(str(references), model=str(dino), dtype="float64")
    check_gradients(lambda images: reward(images, [""]), 1, 3, 30, 36)
    images = eight_bit(3, 3, 33, 33)
    half = SimilarityReward(str(references), model=str(dino), dtype="bfloat16")(images, [""] * 3)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), reward(images, [""] * 3), rtol=0, atol=0.05)


def test_bad_references_and_models(clip: Path, references: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no images"):
        SimilarityReward(str(tmp_path), model=str(clip))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG cut")
    with pytest.raises(InputError, match=r"broken\.png"):
        SimilarityReward(str(tmp_path), model=str(clip))
    with pytest.raises(InputError, match="give model"):
        SimilarityReward(str(references), "style")
    with pytest.raises(InputError, match="must be subject, face or style"):
        SimilarityReward(str(references), "colour")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"crop 0\.5 must be above 0 and up to 1"):
        SimilarityReward(str(references), model=str(clip), crop=0.5)
