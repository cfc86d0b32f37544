"""Inference transforms of open_clip and transformers in tensor space, so that gradients pass.

Both resize 8-bit PIL images. Pillow filters rows first and columns second and clamps to
[0, 255] after each pass; one two-dimensional interpolation differs from that by up to 12/255 around
edges, two clamped passes by about 1/255, which is what rounding to integers costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mmalign.types import InputError

ResizeMode = Literal["shortest", "longest", "squash"]


@dataclass(frozen=True, kw_only=True)
class ClipPreprocess:
    """Resize, crop and normalize images as `open_clip.image_transform_v2(..., is_train=False)`.

    Without gradients the result equals the original's within 1/255 before normalization, because it
    is rounded to 8 bits as Pillow does. Where gradients are recorded the rounding is left out: it
    has no derivative.

    Attributes:
        size: height and width of the network's input, in pixels.
        mean: per channel, in [0, 1] units.
        std: per channel, in [0, 1] units.
        interpolation: Pillow filter, with antialiasing.
        resize_mode: `shortest` fits the short side and crops, `longest` fits the long side and
            pads, `squash` ignores the aspect ratio.
        fill_color: 0 to 255, of the padding.
        resize_to: the short side before the crop, where that is not the crop's; only for `shortest`
            and square sizes.
        crop_down: round the crop's offset down, as transformers does; torchvision, which open_clip
            uses, rounds to the nearest even number.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: ResizeMode = "shortest"
    fill_color: int = 0
    resize_to: int | None = None
    crop_down: bool = False

    @classmethod
    def from_transformers(cls, processor: Mapping[str, Any], name: str) -> ClipPreprocess:
        """Read the dictionary of an image processor: CLIP's, BiT's (DINO) or SigLIP's.

        Args:
            processor: content of `preprocessor_config.json`.
            name: the model, for messages.

        Raises:
            InputError: if it is of another kind.
        """
        interpolation = {2: "bilinear", 3: "bicubic"}.get(processor.get("resample", 3))
        steps = [processor.get(f"do_{step}", True) for step in ("resize", "rescale", "normalize")]
        size, crop = processor.get("size"), processor.get("crop_size")
        if not isinstance(size, Mapping):  # of before transformers 4.25
            size = {"shortest_edge": size}
        short, crops = size.get("shortest_edge"), processor.get("do_center_crop", False)
        height, width = _square(crop) if crops else (size.get("height"), size.get("width"))
        if (
            interpolation is None
            or not all(steps)
            or height is None
            or width is None
            or (short is None) == crops
        ):
            raise InputError(
                f"{name}: images are prepared in a way that is not supported: its image processor "
                "must resize, crop or squash to one size, rescale and normalize"
            )
        if short is not None and (height != width or short < height):
            raise InputError(f"{name}: short side {short} does not fill a {height}x{width} crop")
        return cls(
            size=(height, width),
            mean=tuple(processor["image_mean"]),
            std=tuple(processor["image_std"]),
            interpolation="bilinear" if interpolation == "bilinear" else "bicubic",
            resize_mode="squash" if short is None else "shortest",
            resize_to=short,
            crop_down=True,
        )

    @classmethod
    def from_open_clip(cls, config: Mapping[str, Any]) -> ClipPreprocess:
        """Read `model.visual.preprocess_cfg` of an open_clip model."""
        size = config["size"]
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        mode: ResizeMode = config.get("resize_mode") or "shortest"
        bilinear = config.get("interpolation") == "bilinear"
        if mode == "shortest" and height != width:
            bilinear = False  # open_clip drops the setting in this case
        return cls(
            size=(height, width),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation="bilinear" if bilinear else "bicubic",
            resize_mode=mode,
            fill_color=int(config.get("fill_color") or 0),
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Prepare images (B, 3, H, W) in [0, 1]; returns (B, 3, *size), at least float32."""
        if images.dtype not in (torch.float32, torch.float64):
            images = images.float()
        pixels = self._fit(self._resize(images))
        mean = pixels.new_tensor(self.mean)[:, None, None]
        std = pixels.new_tensor(self.std)[:, None, None]
        return (pixels - mean) / std

    def _resize(self, images: Tensor) -> Tensor:
        height, width = self._target(images.shape[-2], images.shape[-1])
        resized = images
        for target in ((images.shape[-2], width), (height, width)):
            if resized.shape[-2:] != target:
                resized = F.interpolate(
                    resized, size=target, mode=self.interpolation, antialias=True
                ).clamp(0, 1)
        if resized is images or (torch.is_grad_enabled() and images.requires_grad):
            return resized
        return torch.floor(resized * 255 + 0.5) / 255

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if self.resize_mode == "squash":
            return self.size
        if self.resize_mode == "shortest" and self.size[0] == self.size[1]:
            side = self.size[0] if self.resize_to is None else self.resize_to
            if width <= height:
                return int(side * height / width), side
            return side, int(side * width / height)
        ratios = (height / self.size[0], width / self.size[1])
        ratio = max(ratios) if self.resize_mode == "longest" else min(ratios)
        return round(height / ratio), round(width / ratio)

    def _fit(self, images: Tensor) -> Tensor:
        missing = [
            max(want - have, 0) for want, have in zip(self.size, images.shape[-2:], strict=True)
        ]
        if any(missing):
            fill = self.fill_color / 255 if self.resize_mode == "longest" else 0.0
            top, left = missing[0] // 2, missing[1] // 2
            sides = (left, missing[1] - left, top, missing[0] - top)
            images = F.pad(images, sides, value=fill)
        spare = [have - want for want, have in zip(self.size, images.shape[-2:], strict=True)]
        top, left = (n // 2 if self.crop_down else round(n / 2) for n in spare)
        return images[..., top : top + self.size[0], left : left + self.size[1]]


def _square(crop: Any) -> tuple[Any, Any]:
    if isinstance(crop, Mapping):
        return crop.get("height"), crop.get("width")
    return crop, crop
