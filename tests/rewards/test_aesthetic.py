from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mmalign.rewards.aesthetic import AestheticReward, load_head
from mmalign.types import InputError, Reward


def public_mlp(width: int) -> nn.Sequential:
    """The layout of `sac+logos+ava1`: five linear layers, dropout after the first three."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    ).eval()


def save_mlp(path: Path, width: int) -> nn.Sequential:
    head = public_mlp(width)
    torch.save({f"layers.{name}": value for name, value in head.state_dict().items()}, path)
    return head


def test_linear_head(clip_folder: Path, tmp_path: Path) -> None:
    weight, bias = torch.randn(1, 8), torch.tensor([5.0])
    save_file({"weight": weight, "bias": bias}, tmp_path / "head.safetensors")
    reward = AestheticReward(str(tmp_path / "head.safetensors"), str(clip_folder), None)
    images = torch.rand(2, 3, 16, 16)
    expected = reward.clip.embed_images(images) @ weight[0] + 5
    torch.testing.assert_close(reward(images, ["", ""]), expected)
    assert isinstance(reward, Reward)


def test_public_multi_layer_head(clip_folder: Path, tmp_path: Path) -> None:
    head = save_mlp(tmp_path / "head.pth", 8)
    reward = AestheticReward(str(tmp_path / "head.pth"), str(clip_folder), None)
    images = torch.rand(2, 3, 16, 16)
    expected = head(reward.clip.embed_images(images))[:, 0]
    torch.testing.assert_close(reward(images, ["", ""]), expected)


def test_public_width_loads(tmp_path: Path) -> None:
    head = save_mlp(tmp_path / "head.pth", 768)
    vectors = torch.randn(3, 768)
    torch.testing.assert_close(load_head(tmp_path / "head.pth")(vectors), head(vectors))


def test_head_with_rectifiers(tmp_path: Path) -> None:
    torch.manual_seed(1)
    head = nn.Sequential(
        *(nn.Linear(8, 1024), nn.ReLU(), nn.Dropout(0.2)),
        *(nn.Linear(1024, 128), nn.ReLU(), nn.Dropout(0.2)),
        *(nn.Linear(128, 64), nn.ReLU(), nn.Dropout(0.1)),
        *(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 1)),
    ).eval()
    state = {f"layers.{name}": value for name, value in head.state_dict().items()}
    torch.save(state, tmp_path / "head.pth")
    vectors = torch.randn(3, 8)
    torch.testing.assert_close(load_head(tmp_path / "head.pth")(vectors), head(vectors))


def test_gradients_reach_the_image(clip_folder: Path, tmp_path: Path) -> None:
    save_mlp(tmp_path / "head.pth", 8)
    reward = AestheticReward(str(tmp_path / "head.pth"), str(clip_folder), None)
    reward.clip.model.double()
    reward.head.double()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, 3, 7, 9, dtype=torch.float64, generator=generator) * 0.4 + 0.3

    def score(samples: torch.Tensor) -> torch.Tensor:
        return reward(samples, [""])

    assert torch.autograd.gradcheck(score, (images.requires_grad_(),))


def test_head_of_the_wrong_width(clip_folder: Path, tmp_path: Path) -> None:
    save_mlp(tmp_path / "head.pth", 768)
    with pytest.raises(InputError, match=r"width 768, .* makes 8"):
        AestheticReward(str(tmp_path / "head.pth"), str(clip_folder), None)


def test_layers_that_do_not_chain(tmp_path: Path) -> None:
    tensors = {"layers.0.weight": torch.zeros(4, 8), "layers.0.bias": torch.zeros(4)}
    save_file(tensors, tmp_path / "head.safetensors")
    with pytest.raises(InputError, match="not a chain of linear layers"):
        load_head(tmp_path / "head.safetensors")


def test_missing_head(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_head(tmp_path / "head.pth")


def test_damaged_head(tmp_path: Path) -> None:
    for name in ("head.safetensors", "head.pth"):
        (tmp_path / name).write_bytes(b"\x00 not weights")
        with pytest.raises(InputError, match=name):
            load_head(tmp_path / name)


def test_pickled_head_is_refused(tmp_path: Path, exploit: Any) -> None:
    torch.save(exploit, tmp_path / "head.pth")
    with pytest.raises(InputError, match="pickled objects, which are never loaded"):
        load_head(tmp_path / "head.pth")
    assert not exploit.marker.exists()


def test_head_that_is_not_a_dictionary(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "head.pth")
    with pytest.raises(InputError, match="not a dictionary of tensors"):
        load_head(tmp_path / "head.pth")
