"""Tiny random networks in the layouts in which the scorers are published, and photographs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from skimage import data
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from mmalign.config import as_path

TOKENIZER = as_path("pkg://mmalign.shapes/models/sd/tokenizer")
PROMPTS = ["a red circle", "two blue squares above a green triangle", "a red circle"]
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")


def photo(name: str) -> Image.Image:
    return Image.fromarray(getattr(data, name)()).convert("RGB")


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def as_images(tensor: torch.Tensor) -> list[Image.Image]:
    """PIL images of a batch that holds multiples of 1/255."""
    pixels = (tensor * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(image.numpy()) for image in pixels]


def eight_bit(*shape: int) -> torch.Tensor:
    """A random batch in [0, 1] of multiples of 1/255, as files hold them."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, generator=generator) / 255


def levels(ours: torch.Tensor, theirs: torch.Tensor, std: Sequence[float]) -> float:
    """Largest difference of two normalized images, in levels of 1/255 before normalization."""
    assert ours.shape == theirs.shape
    return float(((ours - theirs) * torch.tensor(std)[:, None, None]).abs().max() * 255)


def check_gradients(score: Callable[[torch.Tensor], torch.Tensor], *shape: int) -> None:
    """Compare gradients with finite differences along random directions, in float64."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(*shape, dtype=torch.float64, generator=generator) * 0.4 + 0.3
    images.requires_grad_()
    assert torch.autograd.gradcheck(score, (images,), fast_mode=True)
    (gradient,) = torch.autograd.grad(score(images).sum(), images)
    assert float(gradient.abs().max()) > 0


def convolutions(builder: Callable[..., Any]) -> torch.nn.Sequential:
    """The features of a classifier of torchvision, random, without its huge last layers."""
    with torch.device("meta"):
        features: torch.nn.Sequential = builder(weights=None).features
    features = features.to_empty(device="cpu").eval()
    torch.manual_seed(1)
    for parameter in features.parameters():
        scale = (2 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.05
        torch.nn.init.normal_(parameter, std=scale)
    return features.requires_grad_(False)


def save_clip(folder: Path, *, size: int = 32, processor: bool = True) -> Path:
    """A random two-layer CLIP in transformers' folder format."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    towers = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={
            **towers,
            "num_hidden_layers": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 24,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
        },
        vision_config={**towers, "num_hidden_layers": 2, "image_size": size, "patch_size": 8},
        projection_dim=24,
    )
    model = CLIPModel(config)
    for parameter in model.parameters():  # the usual start gives nearly equal embeddings
        torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.constant_(model.logit_scale, 4.6052)
    model.save_pretrained(folder)
    if processor:
        tokenizer.save_pretrained(folder)
        CLIPImageProcessor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        ).save_pretrained(folder)
    return folder
