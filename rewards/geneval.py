"""Object checks in the manner of GenEval, with a detector of transformers.

Ghosh et al. 2023, "GenEval: an object-focused framework for evaluating text-to-image alignment".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mmalign.config import as_path
from mmalign.rewards._detector import Detector
from mmalign.rewards._geneval_rules import COLORS, Found, Rules, check, read_requirements
from mmalign.rewards._open_clip import load_open_clip
from mmalign.scoring import ScorerError
from mmalign.types import InputError, Modality

PUBLISHED = "facebook/mask2former-swin-small-coco-instance"
TEMPLATES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)
BACKGROUND = (153, 153, 153)
"""What is put around an object before its colour is asked for."""


class GenevalReward:
    """Whether a detector finds the objects that a prompt asks for: how many, what colour, where.

    1 if every requirement of the prompt is met, else 0; with `partial` the share that is met. What
    a prompt requires is read from GenEval's metadata, so only its prompts, or others with rows in
    that format, can be scored. Colours come from CLIP on the object's crop, with GenEval's
    templates. The authors' detector is Mask2Former (Swin-S, COCO) in mmdetection; here it is the
    same network in transformers, whose preprocessing differs, or another one. Not differentiable.
    """

    name = "geneval"
    modality: Modality = "image"
    differentiable = False
    range = (0.0, 1.0)

    def __init__(
        self,
        metadata: str,
        detector: str = PUBLISHED,
        color_model: str = "ViT-L-14-quickgelu",
        color_pretrained: str | None = "openai",
        partial: bool = False,
        rules: dict[str, Any] | None = None,
        dtype: str = "float32",
        device: str = "cpu",
    ) -> None:
        """Load requirements and models.

        Args:
            metadata: file with a row per prompt, as GenEval's `evaluation_metadata.jsonl`.
            detector: folder or hub id of a detector in transformers' format: Mask2Former for
                instances, DETR, RT-DETR, YOLOS, or OWLv2.
            color_model: open_clip model that names colours, in the forms of `ClipReward`; loaded
                if the metadata have colours.
            color_pretrained: tag or weight file of a built-in architecture.
            partial: give the share of the requirements that are met.
            rules: other thresholds than GenEval's: threshold, counting_threshold, max_objects,
                max_overlap, position_threshold.
            dtype: of the detector's weights: float32, float16, bfloat16 or float64.
            device: torch device.

        Raises:
            InputError: if a file or model cannot be used, or the detector lacks a class.
        """
        path = as_path(metadata)
        self.requirements, self.partial = read_requirements(path), partial
        try:
            self.rules = Rules(**(rules or {}))
        except TypeError as error:
            raise InputError(f"reward geneval: rules: {error}") from error
        clauses = [w for r in self.requirements.values() for w in (*r.include, *r.exclude)]
        self.classes = list(dict.fromkeys(clause.name for clause in clauses))
        self.detector = Detector(detector, dtype, device)
        self.detector.check_classes(self.classes)
        self.clip = (
            load_open_clip(color_model, color_pretrained, device, "fp32")
            if any(clause.color for clause in clauses)
            else None
        )
        self.where = str(path)

    @torch.no_grad()
    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1]; returns (B,) on the images' device.

        Raises:
            ScorerError: for a prompt that the metadata do not have.
        """
        for prompt in prompts:
            if prompt not in self.requirements:
                raise ScorerError(f"reward geneval: {self.where} has no row for {prompt[:80]!r}")
        pixels = (samples.detach().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
        images = [Image.fromarray(image.numpy()) for image in pixels.permute(0, 2, 3, 1)]
        detected = self.detector(images, self.classes, self.rules.lowest())
        scores = []
        for image, prompt, objects in zip(images, prompts, detected, strict=True):
            met = check(
                self.requirements[prompt], objects, self.rules, partial(self._colors, image)
            )
            scores.append(sum(met) / len(met) if self.partial else float(all(met)))
        return torch.tensor(scores, device=samples.device)

    def _colors(self, image: Image.Image, objects: Sequence[Found], name: str) -> list[str]:
        if not objects or self.clip is None:
            return []
        crops = [self.clip.embed_images(_crop(image, found)) for found in objects]
        closest = (torch.cat(crops) @ self._color_vectors(name).T).argmax(1)
        return [COLORS[index] for index in closest.tolist()]

    def _color_vectors(self, name: str) -> Tensor:
        """Embed every colour of a class (10, D): the mean over the templates, of length 1."""
        assert self.clip is not None
        texts = [t.format(color=c, name=name) for c in COLORS for t in TEMPLATES]
        vectors = self.clip.embed_texts(texts)
        vectors = vectors.reshape(len(COLORS), len(TEMPLATES), vectors.shape[1])
        return F.normalize(vectors.mean(1), dim=-1)


def _crop(image: Image.Image, found: Found) -> Tensor:
    if found.mask is not None:
        blank = Image.new("RGB", image.size, BACKGROUND)
        image = Image.composite(image, blank, Image.fromarray(found.mask.numpy()))
    left, top, right, bottom = (round(side) for side in found.box)
    crop = image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None].float() / 255
