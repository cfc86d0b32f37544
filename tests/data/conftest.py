from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.types import LatentMoments


@pytest.fixture
def png() -> Callable[..., bytes]:
    """Encoded bytes of a picture that depends on a number."""

    def make(number: int, size: tuple[int, int] = (12, 10), format: str = "PNG") -> bytes:
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, format=format)
        return stream.getvalue()

    return make


@pytest.fixture
def imagefolder(tmp_path: Path, png: Callable[..., bytes]) -> Callable[..., Path]:
    """A folder of pairs; keyword arguments change the row of that number."""

    def make(count: int = 3, **changes: dict[str, Any] | str) -> Path:
        folder = tmp_path / "pairs"
        folder.mkdir(exist_ok=True)
        lines = []
        for number in range(count):
            for side in range(2):
                name = folder / f"{number}_{side}.png"
                name.write_bytes(png(2 * number + side))
            row: dict[str, Any] = {
                "prompt": f"prompt {number}",
                "chosen_file_name": f"{number}_0.png",
                "rejected_file_name": f"{number}_1.png",
            }
            change = changes.get(f"row{number}", {})
            if isinstance(change, str):
                lines.append(change)
                continue
            merged = {**row, **change}
            lines.append(json.dumps({k: v for k, v in merged.items() if v != "DROP"}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return folder

    return make


@pytest.fixture
def photos() -> dict[str, Image.Image]:
    """Real photographs that scikit-image ships, made small."""
    from skimage import data

    pictures = {
        "astronaut": data.astronaut(),
        "coffee": data.coffee(),
        "chelsea": data.chelsea(),
        "rocket": data.rocket(),
    }
    return {name: Image.fromarray(pixels).resize((96, 72)) for name, pixels in pictures.items()}


class FakeAdapter:
    family = "fake"
    denoiser: Any = None
    prediction_type = "epsilon"
    alphas_cumprod = torch.linspace(0.9, 0.1, 10)

    def __init__(self, fingerprint: str = "fake-1") -> None:
        self.fingerprint = fingerprint
        self.calls = SimpleNamespace(images=0, prompts=0)
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(4, 3, 4, 4, generator=generator)

    def encode_images(self, images: torch.Tensor) -> LatentMoments:
        self.calls.images += len(images)
        mean = torch.nn.functional.conv2d(images, self.weight, stride=4)
        return LatentMoments(mean, mean.abs() * 0.1)

    def encode_condition(self, prompts: Any, *, height: int, width: int) -> dict[str, torch.Tensor]:
        self.calls.prompts += len(prompts)
        rows = [[float(sum(map(ord, p)) % 97), float(len(p)), float(height)] for p in prompts]
        return {"prompt_embeds": torch.tensor(rows)[:, None, :].expand(-1, 5, -1) / 7}


@pytest.fixture
def fake_adapter() -> FakeAdapter:
    return FakeAdapter()
