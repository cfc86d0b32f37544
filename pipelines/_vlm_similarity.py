"""How much a token says about an image, by CLIP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from mmalign.config import VlmDpoConfig
from mmalign.data.images import to_tensor
from mmalign.objectives.perturb import token_similarity
from mmalign.pipelines._vlm_rows import Similarity


def clip_similarity(config: VlmDpoConfig, device: str) -> Similarity | None:
    """Load the open_clip model of a run; None where none is named.

    Raises:
        InputError: it cannot be loaded.
    """
    if config.clip_model is None:
        return None
    from mmalign.rewards._open_clip import load_open_clip

    clip = load_open_clip(config.clip_model, config.clip_pretrained, device, "fp32")

    @torch.no_grad()
    def similarity(pictures: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """Compare each text with the mean direction of the images, (L,)."""
        images = [clip.embed_images(to_tensor(picture)[None].to(device))[0] for picture in pictures]
        # An empty text is what is left of some tokens, such as half of a character.
        tokens = clip.embed_texts([text or " " for text in texts])
        return token_similarity(torch.stack(images).mean(0), tokens)

    return similarity
