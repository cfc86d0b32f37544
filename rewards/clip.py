"""CLIP similarity of image and prompt as a reward.

Radford et al. 2021, "Learning transferable visual models from natural language supervision".
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from mmalign.rewards._open_clip import load_open_clip
from mmalign.types import Modality

SHAPES_CLIP = "pkg://mmalign.shapes/models/clip"
logger = logging.getLogger(__name__)


class ClipReward:
    """Cosine similarity of the image's and the prompt's embedding.

        r(x, c) = <f(x), g(c)> / (|f(x)| |g(c)|)

    Unscaled: CLIPScore papers often multiply by 100. Differentiable with respect to the image.
    """

    name = "clip"
    modality: Modality = "image"
    differentiable = True
    range = (-1.0, 1.0)

    def __init__(
        self,
        model: str | None = None,
        pretrained: str | None = None,
        precision: str = "fp32",
        device: str = "cpu",
    ) -> None:
        """Load the model.

        Args:
            model: open_clip architecture, `hf-hub:org/name`, `local-dir:folder`, a folder or
                `pkg://package/folder`; Shapes world's own, with a warning, when omitted.
            pretrained: tag or weight file of a built-in architecture.
            precision: open_clip's precision name.
            device: torch device.

        Raises:
            InputError: if the model cannot be loaded.
        """
        if model is None:
            logger.warning(
                "reward clip: no model given, so Shapes world's own scores, which knows nothing of"
                " photographs; for others set options.model, such as ViT-L-14 (pretrained: openai)"
            )
        self.clip = load_open_clip(model or SHAPES_CLIP, pretrained, device, precision)

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1]; returns (B,) on the images' device."""
        images = self.clip.embed_images(samples)
        texts = self.clip.embed_texts(prompts)
        return (images * texts).sum(-1).to(samples.device)
