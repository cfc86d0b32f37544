from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch.nn import functional as F
from transformers import CLIPConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmalign.rewards.safety import SafetyReward
from mmalign.types import InputError, Reward

from reward_zoo import (  # isort: skip
    as_images,
    as_tensor,
    check_gradients,
    eight_bit,
    levels,
    photo,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checker")
    torch.manual_seed(0)
    config = CLIPConfig(
        vision_config={
            **{"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2},
            **{"num_hidden_layers": 2, "image_size": 32, "patch_size": 8},
        },
        projection_dim=24,
    )
    checker = StableDiffusionSafetyChecker(config)
    for parameter in checker.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.uniform_(checker.concept_embeds_weights, 0.3, 0.5)
    torch.nn.init.uniform_(checker.special_care_embeds_weights, -0.1, 0.1)
    checker.save_pretrained(folder)
    return folder


def vectors(
    folder: Path, images: torch.Tensor
) -> tuple[StableDiffusionSafetyChecker, torch.Tensor]:
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    pixels = processor(as_images(images), return_tensors="pt")["pixel_values"]
    checker = StableDiffusionSafetyChecker.from_pretrained(folder).eval()
    with torch.no_grad():
        return checker, checker.visual_projection(checker.vision_model(pixels).pooler_output)


def test_equals_the_definition_and_the_checkers_verdict(folder: Path) -> None:
    images = torch.cat([eight_bit(12, 3, 32, 32), torch.zeros(1, 3, 32, 32)])
    reward = SafetyReward(str(folder))
    scores = reward(images, [""] * 13)
    checker, embedded = vectors(folder, images)
    expected, found = [], set()
    for vector in embedded:
        special = F.cosine_similarity(vector[None], checker.special_care_embeds)
        care = bool((special > checker.special_care_embeds_weights).any())
        found.add(care)
        likeness = F.cosine_similarity(vector[None], checker.concept_embeds)
        expected.append(-(likeness - checker.concept_embeds_weights).max() - 0.01 * care)
    assert isinstance(reward, Reward)
    torch.testing.assert_close(scores, torch.stack(expected), rtol=0, atol=1e-5)
    shifted = _thresholds(folder, checker, float(scores.median()))
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    pixels = processor(as_images(images), return_tensors="pt")["pixel_values"]
    _, blocked = shifted(clip_input=pixels, images=images.clone())
    again = SafetyReward(str(folder / "shifted"))(images, [""] * 13)
    clear = again.abs() > 0.001
    assert int(clear.sum()) > 2
    assert len(set((again[clear] < 0).tolist())) == 2
    assert (again[clear] < 0).tolist() == torch.tensor(blocked)[clear].tolist()


def _thresholds(
    folder: Path, checker: StableDiffusionSafetyChecker, by: float
) -> StableDiffusionSafetyChecker:
    """Move every threshold so that half of the images are blocked."""
    checker.concept_embeds_weights.data -= by
    checker.save_pretrained(folder / "shifted")
    return checker


def test_gradients_reach_the_image(folder: Path) -> None:
    reward = SafetyReward(str(folder), dtype="float64")
    check_gradients(lambda images: reward(images, [""]), 1, 3, 19, 24)


def test_checker_inside_a_pipeline(folder: Path, tmp_path: Path) -> None:
    checker = StableDiffusionSafetyChecker.from_pretrained(folder)
    checker.save_pretrained(tmp_path / "safety_checker")
    (tmp_path / "model_index.json").write_text("{}")
    images = eight_bit(2, 3, 32, 32)
    assert torch.equal(
        SafetyReward(str(tmp_path))(images, ["", ""]), SafetyReward(str(folder))(images, ["", ""])
    )


def test_half_precision(folder: Path) -> None:
    images = eight_bit(2, 3, 32, 32)
    half = SafetyReward(str(folder), dtype="bfloat16")(images, ["", ""])
    torch.testing.assert_close(
        half.float(), SafetyReward(str(folder))(images, ["", ""]), rtol=0, atol=0.05
    )


def test_preprocessing_equals_pillow_on_photographs(folder: Path) -> None:
    preprocess = SafetyReward(str(folder)).preprocess
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    for name in ("astronaut", "chelsea", "coffee"):
        theirs = processor(photo(name), return_tensors="pt")["pixel_values"]
        assert levels(preprocess(as_tensor(photo(name))), theirs, preprocess.std) <= 1.001


def test_not_a_checker(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be loaded"):
        SafetyReward(str(tmp_path))
