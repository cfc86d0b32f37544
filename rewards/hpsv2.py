"""HPS v2.0 and v2.1: which image of a prompt people prefer.

Wu et al. 2023, "Human preference score v2: a solid benchmark for evaluating human preferences of
text-to-image synthesis", section 4: CLIP ViT-H-14 fine-tuned on ranked images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor

from mmalign.rewards._open_clip import load_open_clip
from mmalign.rewards._weights import find_file, load_into, load_tensors
from mmalign.types import InputError, Modality

PUBLISHED = "xswu/HPSv2"
FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


class HpsV2Reward:
    """Cosine similarity of the image's and the prompt's embedding.

        r(x, c) = <f(x), g(c)> / (|f(x)| |g(c)|)

    Unscaled; the authors' tables multiply by 100. Prompt as it is, cut to 77 tokens; images: long
    side to 224 (bicubic), padded with black to a square, as the authors' fork of open_clip does.
    Differentiable with respect to the image.
    """

    name = "hpsv2"
    modality: Modality = "image"
    differentiable = True
    range = (-1.0, 1.0)

    def __init__(
        self,
        checkpoint: str = PUBLISHED,
        version: Literal["v2.0", "v2.1"] = "v2.1",
        model: str = "ViT-H-14",
        precision: str = "fp32",
        device: str = "cpu",
    ) -> None:
        """Load the model.

        Args:
            checkpoint: `HPS_v2.1_compressed.pt` or `HPS_v2_compressed.pt`, a folder that has it, or
                a hub id.
            version: which of the two, where `checkpoint` is not a file.
            model: open_clip architecture or folder with `open_clip_config.json`.
            precision: open_clip's precision name.
            device: torch device.

        Raises:
            InputError: if the checkpoint is missing, damaged, pickled, or of another architecture.
        """
        if version not in FILES:
            raise InputError(f"reward hpsv2: version {version!r} is not v2.0 or v2.1")
        path = find_file(checkpoint, FILES[version])
        clip = load_open_clip(model, None, device, precision, weights_later=True)
        load_into(clip.model, load_tensors(path), path)
        self.clip = replace(clip, preprocess=replace(clip.preprocess, resize_mode="longest"))

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1]; returns (B,) on the images' device."""
        images = self.clip.embed_images(samples)
        texts = self.clip.embed_texts(prompts)
        return (images * texts).sum(-1).to(samples.device)
