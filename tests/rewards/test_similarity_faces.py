"""The face embedding against its definition, on random weights in insightface's layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from mmalign.rewards._iresnet import DEPTHS, IResNet, load_iresnet
from mmalign.rewards.similarity import SimilarityReward
from mmalign.types import InputError, Reward

from reward_zoo import as_tensor, check_gradients, eight_bit, photo  # isort: skip

R18 = (2, 2, 2, 2)


def blocks(depths: tuple[int, ...]) -> Iterator[tuple[str, int, int, int]]:
    """Name, channels before and after, and stride of every residual block."""
    before = 64
    for stage, (depth, width) in enumerate(zip(depths, (64, 128, 256, 512), strict=True), 1):
        for place in range(depth):
            yield f"layer{stage}.{place}", before, width, 2 if place == 0 else 1
            before = width


def published(depths: tuple[int, ...]) -> dict[str, Tensor]:
    """Random weights under the names and in the shapes of arcface_torch's backbone.pth."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def weight(name: str, *shape: int) -> None:
        scale = (1 / torch.Size(shape[1:]).numel()) ** 0.5
        state[name] = torch.randn(shape, generator=generator) * scale

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 0.8 + 0.4 * torch.rand(width, generator=generator)
        state[f"{name}.bias"] = 0.1 * torch.randn(width, generator=generator)
        state[f"{name}.running_mean"] = 0.1 * torch.randn(width, generator=generator)
        state[f"{name}.running_var"] = 0.8 + 0.4 * torch.rand(width, generator=generator)
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def slope(name: str, width: int) -> None:
        state[f"{name}.weight"] = 0.5 * torch.rand(width, generator=generator)

    weight("conv1.weight", 64, 3, 3, 3)
    norm("bn1", 64)
    slope("prelu", 64)
    for name, before, width, stride in blocks(depths):
        norm(f"{name}.bn1", before)
        weight(f"{name}.conv1.weight", width, before, 3, 3)
        norm(f"{name}.bn2", width)
        slope(f"{name}.prelu", width)
        weight(f"{name}.conv2.weight", width, width, 3, 3)
        norm(f"{name}.bn3", width)
        if stride == 2:
            weight(f"{name}.downsample.0.weight", width, before, 1, 1)
            norm(f"{name}.downsample.1", width)
    norm("bn2", 512)
    weight("fc.weight", 512, 512 * 7 * 7)
    state["fc.bias"] = 0.1 * torch.randn(512, generator=generator)
    norm("features", 512)
    return state


def embed(state: dict[str, Tensor], depths: tuple[int, ...], x: Tensor) -> Tensor:
    """The published network written out on tensors."""

    def norm(name: str, x: Tensor) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        scale = state[f"{name}.weight"] / (var + 1e-5).sqrt()
        shift = state[f"{name}.bias"] - mean * scale
        shape = (1, -1, 1, 1)[: x.ndim]
        return x * scale.view(shape) + shift.view(shape)

    def bend(name: str, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, x * state[f"{name}.weight"].view(1, -1, 1, 1))

    x = bend("prelu", norm("bn1", F.conv2d(x, state["conv1.weight"], padding=1)))
    for name, _, _, stride in blocks(depths):
        inner = F.conv2d(norm(f"{name}.bn1", x), state[f"{name}.conv1.weight"], padding=1)
        inner = bend(f"{name}.prelu", norm(f"{name}.bn2", inner))
        inner = F.conv2d(inner, state[f"{name}.conv2.weight"], stride=stride, padding=1)
        if stride == 2:
            x = F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=2)
            x = norm(f"{name}.downsample.1", x)
        x = x + norm(f"{name}.bn3", inner)
    return norm("features", norm("bn2", x).flatten(1) @ state["fc.weight"].T + state["fc.bias"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of 18 layers, and a folder with two faces."""
    folder = tmp_path_factory.mktemp("faces")
    torch.save(published(R18), folder / "backbone.pth")
    (folder / "faces").mkdir()
    face = photo("astronaut").crop((170, 60, 282, 172))
    face.save(folder / "faces" / "a.png")
    face.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "faces" / "b.png")
    return folder


def load(folder: Path, **options: Any) -> SimilarityReward:
    return SimilarityReward(str(folder / "faces"), "face", str(folder / "backbone.pth"), **options)


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_equals_the_definition(folder: Path, reduce: Any) -> None:
    reward = load(folder, reduce=reduce)
    images = eight_bit(2, 3, 112, 112)
    faces = torch.cat([as_tensor(Image.open(folder / "faces" / f"{n}.png")) for n in "ab"])
    state = torch.load(folder / "backbone.pth", weights_only=True)
    with torch.no_grad():
        vectors = embed(state, R18, (torch.cat([images, faces]) * 255 - 127.5) / 127.5)
        scores = reward(images, ["", ""])
    table = F.cosine_similarity(vectors[:2, None], vectors[None, 2:], dim=2)
    expected = table.mean(1) if reduce == "mean" else table.max(1).values
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    assert float(expected.diff().abs()) > 1e-3
    assert isinstance(reward, Reward)
    assert reward.range == (-1.0, 1.0)


def test_deeper_networks_equal_the_definition(tmp_path: Path) -> None:
    """In safetensors, without the counters that a conversion leaves out."""
    state = published((3, 4, 14, 3))
    kept = {name: value for name, value in state.items() if "num_batches" not in name}
    save_file(kept, tmp_path / "r50.safetensors")
    faces = eight_bit(1, 3, 112, 112) * 2 - 1
    with torch.no_grad():
        ours = load_iresnet(tmp_path / "r50.safetensors")(faces)
        expected = embed(state, (3, 4, 14, 3), faces)
    scale = float(expected.norm())
    torch.testing.assert_close(ours / scale, expected / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["r18", "r34", "r50", "r100"])
def test_names_and_shapes_of_the_published_networks(name: str) -> None:
    with torch.device("meta"):
        network = IResNet(DEPTHS[name])
        shapes = {key: value.shape for key, value in network.state_dict().items()}
    millions = {"r18": 24.0, "r34": 34.1, "r50": 43.6, "r100": 65.2}[name]
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    if name == "r18":
        assert shapes == {key: value.shape for key, value in published(R18).items()}


def test_a_face_is_most_like_itself_at_any_size(folder: Path) -> None:
    reward = load(folder, reduce="max")
    face = as_tensor(Image.open(folder / "faces" / "a.png"))
    larger = F.interpolate(face, scale_factor=4, mode="bilinear")
    assert float(reward(face, [""])) == pytest.approx(1, abs=1e-5)
    assert float(reward(larger, [""])) > 0.9
    assert float(reward(1 - face, [""])) < 0.9


def test_crop_takes_the_middle_of_what_is_scored(folder: Path) -> None:
    """A face framed by noise, in a wide image: half of the short side is the face itself."""
    face = as_tensor(Image.open(folder / "faces" / "a.png"))
    wide = eight_bit(1, 3, 224, 300)
    wide[..., 56:168, 94:206] = face
    cropped = load(folder, reduce="max", crop=0.5)(wide, [""])
    torch.testing.assert_close(cropped, torch.ones(1), rtol=0, atol=1e-5)
    assert float(load(folder, reduce="max")(wide, [""])) < 0.9


def test_gradients_and_half_precision(folder: Path) -> None:
    reward = load(folder, dtype="float64", crop=0.9)
    check_gradients(lambda images: reward(images, [""]), 1, 3, 120, 130)
    image = eight_bit(1, 3, 112, 112)
    with torch.no_grad():
        half = load(folder, dtype="bfloat16")(image, [""])
        exact = load(folder)(image, [""])
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0, atol=0.05)


def test_bad_weights_and_faces(folder: Path, tmp_path: Path, exploit: Any) -> None:
    faces = str(folder / "faces")
    with pytest.raises(InputError, match="for kind face give model, a file of insightface"):
        SimilarityReward(faces, "face")
    with pytest.raises(InputError, match=r"w600k\.onnx is ONNX"):
        SimilarityReward(faces, "face", str(tmp_path / "w600k.onnx"))
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="stages have 0, 0, 0, 0 residual blocks"):
        SimilarityReward(faces, "face", str(tmp_path / "other.pth"))
    state = torch.load(folder / "backbone.pth", weights_only=True)
    del state["fc.bias"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(InputError, match=r"cut\.pth is not a checkpoint .* lacks fc\.bias"):
        SimilarityReward(faces, "face", str(tmp_path / "cut.pth"))
    torch.save(exploit, tmp_path / "bad.pth")
    with pytest.raises(InputError, match="pickled objects"):
        SimilarityReward(faces, "face", str(tmp_path / "bad.pth"))
    assert not exploit.marker.exists()
    with pytest.raises(InputError, match="crop 0 must be above 0"):
        load(folder, crop=0)
    photo("coffee").save(tmp_path / "whole.png")
    with pytest.raises(InputError, match=r"whole\.png has 600 x 400 pixels: .* square crops"):
        SimilarityReward(str(tmp_path / "whole.png"), "face", str(folder / "backbone.pth"))
