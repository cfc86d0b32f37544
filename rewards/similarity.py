"""Similarity to reference images: the same subject, the same face, or the same style.

Subject: Ruiz et al. 2023, "DreamBooth", section 4.2 (the metrics DINO and CLIP-I). Face: Deng et
al. 2018, "ArcFace". Style: Gatys et al. 2016, "Image style transfer using convolutional neural
networks", equations 3 to 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from torch import Tensor

from mmalign.config import as_path
from mmalign.data.images import SUFFIXES, open_image
from mmalign.rewards._backbone import MEAN, STD, load_backbone
from mmalign.rewards._clip_preprocess import ClipPreprocess
from mmalign.rewards._iresnet import SIZE, load_iresnet
from mmalign.rewards._pretrained import (
    PretrainedClip,
    load_config,
    load_preprocess,
    load_pretrained,
    unit,
)
from mmalign.rewards._weights import to_dtype
from mmalign.types import ImageRef, InputError, Modality

SUBJECT = "facebook/dinov2-base"
STYLE_TAPS = (1, 6, 11, 20, 29)
"""Of VGG-19, after the rectifiers of conv1_1 to conv5_1."""
MAX_PIXELS = 50_000_000
Kind = Literal["subject", "face", "style"]
Reduce = Literal["mean", "max"]


class SimilarityReward:
    """How much an image is like reference images; the prompt is not looked at.

    `subject` is the cosine similarity of embeddings, of a CLIP model or of DINOv2's class token:

        r(x) = reduce_j <f(x), f(y_j)> / (|f(x)| |f(y_j)|)        in [-1, 1]

    `face` is the same with the embedding of an ArcFace network. It looks for no face: references
    are aligned square crops of one, as insightface makes them; of an image that is scored a square
    in the middle is taken, `crop` of its short side. Without a face there the score means nothing.

    `style` is minus the distance of the Gram matrices of five feature maps of VGG-19, with C_l
    channels and M_l places:

        r(x) = reduce_j -1/5 sum_l |G_l(x) - G_l(y_j)|^2 / (4 C_l^2),  G_l = F_l F_l^T / M_l

    which is Gatys' loss, with M_l inside so that sizes may differ. Differentiable with respect to
    the image. References are read once. Images: as the model's image processor does, for style
    short side to `size` (bicubic) and centre crop, for faces the square to 112 x 112 (bilinear)
    and to [-1, 1].
    """

    name = "similarity"
    modality: Modality = "image"
    differentiable = True

    def __init__(
        self,
        references: str,
        kind: Kind = "subject",
        model: str | None = None,
        reduce: Reduce = "mean",
        size: int = 224,
        crop: float = 1.0,
        dtype: str = "float32",
        device: str = "cpu",
    ) -> None:
        """Load the model and the references.

        Args:
            references: an image, or a folder of images.
            kind: what is compared.
            model: for subjects, folder or hub id of CLIP or DINOv2 in transformers' format,
                DINOv2-base when omitted; for faces, a file with insightface's PyTorch weights (r18
                to r100); for styles, a file with torchvision's weights of VGG-19.
            reduce: over the references, the mean or the most similar one.
            size: for styles, height and width that are compared, in pixels.
            crop: for faces, the side of the square that is scored, as a share of the image's short
                side; above 0, up to 1. References are not cropped.
            dtype: of the weights: float32, float16, bfloat16 or float64.
            device: torch device.

        Raises:
            InputError: if a file is missing, damaged or pickled, or there is no reference.
        """
        _check(kind, model, reduce, crop)
        self.range = (float("-inf"), 0.0) if kind == "style" else (-1.0, 1.0)
        if kind == "style":
            self.describe = _style(as_path(str(model)), size, dtype, device)
        elif kind == "face":
            self.describe = _face(as_path(str(model)), dtype, device)
        else:
            self.describe = _subject(model or SUBJECT, dtype, device)
        self.kind, self.reduce, self.crop = kind, reduce, crop
        images = _read(as_path(references), square=kind == "face")
        with torch.no_grad():
            described = [self.describe(image) for image in images]
        self.references = [torch.cat(parts) for parts in zip(*described, strict=True)]

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1]; returns (B,) on the images' device."""
        shown = _middle(samples, self.crop) if self.kind == "face" else samples
        described = self.describe(shown)
        if self.kind != "style":
            table = described[0] @ self.references[0].T
        else:
            table = -sum(
                (
                    (own[:, None] - other[None]).square().sum((2, 3)) / (4 * own.shape[-1] ** 2)
                    for own, other in zip(described, self.references, strict=True)
                ),
                start=torch.zeros(()),
            ) / len(described)
        scores = table.mean(1) if self.reduce == "mean" else table.amax(1)
        return scores.to(samples.device)


Describe = Callable[[Tensor], list[Tensor]]
_WEIGHTS = {
    "subject": "CLIP or DINOv2",
    "face": "insightface's weights",
    "style": "VGG-19's weights",
}


def _check(kind: str, model: str | None, reduce: str, crop: float) -> None:
    if kind not in _WEIGHTS or reduce not in ("mean", "max"):
        raise InputError(
            f"reward similarity: kind {kind!r} must be subject, face or style; reduce {reduce!r} "
            "mean or max"
        )
    if not 0 < crop <= 1 or (crop != 1 and kind != "face"):
        raise InputError(
            f"reward similarity: crop {crop} must be above 0 and up to 1, and is for faces"
        )
    if model is None and kind != "subject":
        raise InputError(
            f"reward similarity: for kind {kind} give model, a file of {_WEIGHTS[kind]}"
        )


def _subject(model: str, dtype: str, device: str) -> Describe:
    kinds: dict[str, Any] = {
        "clip": transformers.CLIPModel,
        "dinov2": transformers.Dinov2Model,
        "dinov2_with_registers": transformers.Dinov2WithRegistersModel,
    }
    found = load_config(transformers.AutoConfig, model).model_type
    if found not in kinds:
        raise InputError(
            f"{model}: model_type {found!r} makes no embeddings here: use {', '.join(kinds)}"
        )
    network, preprocess = (
        load_pretrained(kinds[found], model, dtype, device),
        load_preprocess(model),
    )
    if found == "clip":
        clip = PretrainedClip(network, None, preprocess)
        return lambda images: [clip.embed_images(images)]

    def embed(images: Tensor) -> list[Tensor]:
        pixels = preprocess(images.to(network.device)).to(network.dtype)
        return [unit(network(pixel_values=pixels).pooler_output)]

    return embed


def _face(path: Path, dtype: str, device: str) -> Describe:
    network = load_iresnet(path).to(device, to_dtype(dtype))
    weight = next(network.parameters())
    preprocess = ClipPreprocess(
        size=(SIZE, SIZE), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear"
    )

    def embed(images: Tensor) -> list[Tensor]:
        pixels = preprocess(images.to(weight.device)).to(weight.dtype)
        return [unit(network(pixels))]

    return embed


def _middle(images: Tensor, share: float) -> Tensor:
    """Cut a centred square, its side a share of the short side, out of images (B, 3, H, W)."""
    height, width = images.shape[-2:]
    side = max(round(min(height, width) * share), 1)
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]


def _style(path: Path, size: int, dtype: str, device: str) -> Describe:
    backbone = load_backbone("vgg19", path, STYLE_TAPS).to(device, to_dtype(dtype))
    weight = next(backbone.parameters())
    preprocess = ClipPreprocess(size=(size, size), mean=MEAN, std=STD)

    def grams(images: Tensor) -> list[Tensor]:
        pixels = preprocess(images.to(weight.device)).to(weight.dtype)
        return [_gram(features) for features in backbone(pixels)]

    return grams


def _gram(features: Tensor) -> Tensor:
    flat = features.flatten(2)
    flat = flat.float() if flat.element_size() < 4 else flat
    return flat @ flat.transpose(1, 2) / flat.shape[2]


def _read(path: Path, *, square: bool) -> list[Tensor]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    else:
        files = [path]
    if not files:
        raise InputError(f"reward similarity: folder {path} has no images")
    images = [open_image(ImageRef(file, str(file)), max_pixels=MAX_PIXELS) for file in files]
    for file, image in zip(files, images, strict=True):
        if square and image.width != image.height:
            raise InputError(
                f"reward similarity: reference {file} has {image.width} x {image.height} pixels: "
                "for faces give square crops of aligned faces"
            )
    return [torch.from_numpy(np.array(i)).permute(2, 0, 1)[None].float() / 255 for i in images]
