"""PickScore: what people picked between two images of one prompt.

Kirstain et al. 2023, "Pick-a-Pic: an open dataset of user preferences for text-to-image
generation", section 4: CLIP-H fine-tuned on choices.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmalign.rewards._pretrained import load_clip
from mmalign.types import Modality

PUBLISHED = "yuvalkirstain/PickScore_v1"


class PickScoreReward:
    """Scaled cosine similarity of the image's and the prompt's embedding.

        r(x, c) = exp(s) <f(x), g(c)> / (|f(x)| |g(c)|)

    with the learned temperature s; exp(s) is 100 in CLIP-H, which the published model starts from.
    The difference of two scores is the log-odds that people prefer one. Prompt as it is, cut to 77
    tokens; images: short side to 224 (bicubic), centre crop. Differentiable with respect to the
    image.
    """

    name = "pickscore"
    modality: Modality = "image"
    differentiable = True

    def __init__(
        self,
        model: str = PUBLISHED,
        processor: str | None = None,
        dtype: str = "float32",
        device: str = "cpu",
    ) -> None:
        """Load the model.

        Args:
            model: folder in transformers' format or hub id of a CLIP model.
            processor: where tokenizer and image processor are, if not with the model.
            dtype: of the weights: float32, float16, bfloat16 or float64.
            device: torch device.

        Raises:
            InputError: if the model cannot be loaded.
        """
        self.clip = load_clip(model, processor, dtype, device)
        self.scale = float(self.clip.model.logit_scale.detach().double().exp())
        self.range = (-self.scale, self.scale)

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1]; returns (B,) on the images' device."""
        images = self.clip.embed_images(samples)
        texts = self.clip.embed_texts(prompts)
        return (self.scale * (images * texts).sum(-1)).to(samples.device)
