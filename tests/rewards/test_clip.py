from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from mmalign.rewards.clip import ClipReward
from mmalign.types import InputError, Reward

PROMPTS = ["a red circle", "two blue squares", "a red circle"]


@pytest.fixture(scope="module")
def reward(clip_folder: Path) -> ClipReward:
    return ClipReward(str(clip_folder))


def test_is_a_reward(reward: ClipReward) -> None:
    assert isinstance(reward, Reward)
    assert (reward.name, reward.modality, reward.differentiable) == ("clip", "image", True)


def test_equals_open_clip_on_8_bit_images(reward: ClipReward, clip_folder: Path) -> None:
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{clip_folder}")(PROMPTS)
    pixels = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
    batch = torch.stack([transform(Image.fromarray(image.numpy())) for image in pixels])
    with torch.no_grad():
        images = F.normalize(model.eval().encode_image(batch), dim=-1)
        expected = (images * F.normalize(model.encode_text(tokens), dim=-1)).sum(-1)
    scores = reward(pixels.permute(0, 3, 1, 2) / 255, PROMPTS)
    torch.testing.assert_close(scores, expected)
    assert scores.shape == (3,)


@pytest.mark.parametrize("form", ["{}", "local-dir:{}"])
def test_forms_of_a_folder(form: str, clip_folder: Path, reward: ClipReward) -> None:
    images = torch.rand(3, 3, 20, 24)
    other = ClipReward(form.format(clip_folder))
    assert torch.equal(other(images, PROMPTS), reward(images, PROMPTS))


def test_folder_in_a_package(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "packaged_clip"
    shutil.copytree(clip_folder, package / "weights")
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert ClipReward("pkg://packaged_clip/weights").range == (-1.0, 1.0)


def test_architecture_with_a_weight_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="neither a tag nor a file"):
        ClipReward("ViT-B-32", pretrained="no_such_tag")
    with pytest.raises(InputError, match="pretrained=None"):
        ClipReward("ViT-B-32")


def test_gradients_reach_the_image(clip_folder: Path) -> None:
    reward = ClipReward(str(clip_folder))
    reward.clip.model.double()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3, 7, 9, dtype=torch.float64, generator=generator) * 0.4 + 0.3

    def score(samples: torch.Tensor) -> torch.Tensor:
        return reward(samples, ["a red circle"])

    assert torch.autograd.gradcheck(score, (images.requires_grad_(),))


def test_network_is_frozen(reward: ClipReward) -> None:
    assert not reward.clip.model.training
    assert not any(p.requires_grad for p in reward.clip.model.parameters())


def test_missing_folder() -> None:
    with pytest.raises(InputError, match=r"folder /nowhere/clip does not exist"):
        ClipReward("local-dir:/nowhere/clip")


def test_unknown_architecture() -> None:
    with pytest.raises(InputError, match="neither a folder nor a built-in architecture"):
        ClipReward("ViT-Z-99")


def test_missing_config_and_weights(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no open_clip_config\.json"):
        ClipReward(str(tmp_path))
    shutil.copy(clip_folder / "open_clip_config.json", tmp_path)
    with pytest.raises(InputError, match="no weights"):
        ClipReward(str(tmp_path))


def test_damaged_weights(clip_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(clip_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(InputError, match="cannot load open_clip model"):
        ClipReward(str(tmp_path))


def test_pickled_weights_are_refused(clip_folder: Path, tmp_path: Path, exploit: Any) -> None:
    shutil.copy(clip_folder / "open_clip_config.json", tmp_path)
    torch.save({"state_dict": exploit}, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(InputError, match="pickled objects, which are never loaded"):
        ClipReward(str(tmp_path))
    assert not exploit.marker.exists()


def test_the_reward_of_shapes_world_is_not_taken_silently(caplog: pytest.LogCaptureFixture) -> None:
    ClipReward("pkg://mmalign.shapes/models/clip")
    assert not caplog.records
    ClipReward()
    assert "knows nothing of photographs" in caplog.text


@pytest.mark.parametrize(("tag", "quick"), [("openai", True), ("laion400m_e32", False)])
def test_activation_is_the_one_the_weights_were_trained_with(
    tag: str, quick: bool, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = open_clip.create_model
    asked: dict[str, object] = {}

    def without_download(name: str, pretrained: str, **options: Any) -> Any:
        asked.update(options, name=name, pretrained=pretrained)
        quick_gelu = bool(options["force_quick_gelu"])
        return original(f"local-dir:{clip_folder}", force_quick_gelu=quick_gelu)

    monkeypatch.setattr(open_clip, "create_model", without_download)
    reward = ClipReward("ViT-L-14", pretrained=tag)
    used = {type(module).__name__ for module in reward.clip.model.transformer.modules()}
    assert (asked["name"], asked["pretrained"]) == ("ViT-L-14", tag)
    assert ("QuickGELU" in used) is quick
