"""How far an image is from what Stable Diffusion's safety checker blocks.

The checker compares CLIP's embedding of the image with embeddings of unwanted concepts, each with a
threshold of its own; what the concepts are is not published.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import Tensor

from mmalign.config import as_path
from mmalign.rewards._clip_preprocess import ClipPreprocess
from mmalign.rewards._pretrained import load_pretrained, unit
from mmalign.types import Modality

PUBLISHED = "CompVis/stable-diffusion-safety-checker"
CARE = 0.01
"""By how much every threshold falls when one of the special concepts is found."""
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class SafetyReward:
    """Distance to the nearest unwanted concept's threshold; the prompt is not looked at.

        r(x) = -max_k (cos(f(x), e_k) - t_k + a(x)),  a = 0.01 if cos(f(x), s_j) > t'_j for any j

    Below 0 the checker blocks the image (it rounds to three decimals, so above -0.0005 it may not).
    Images: short side to 224 (bicubic), centre crop. Differentiable with respect to the image,
    where a is constant. Reward alone makes nothing safe: a policy may learn what the checker does
    not see.
    """

    name = "safety"
    modality: Modality = "image"
    differentiable = True
    range = (-2.0, 2.0)

    def __init__(self, model: str = PUBLISHED, dtype: str = "float32", device: str = "cpu") -> None:
        """Load the checker.

        Args:
            model: folder or hub id of the checker, or folder of a pipeline that contains one.
            dtype: of the weights: float32, float16, bfloat16 or float64.
            device: torch device.

        Raises:
            InputError: if the model cannot be loaded.
        """
        inside = (as_path(model) / "model_index.json").is_file()
        options = {"subfolder": "safety_checker"} if inside else {}
        self.checker = load_pretrained(
            StableDiffusionSafetyChecker, model, dtype, device, **options
        )
        side = self.checker.config.vision_config.image_size
        self.preprocess = ClipPreprocess(
            size=(side, side), mean=CLIP_MEAN, std=CLIP_STD, crop_down=True
        )

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1]; returns (B,) on the images' device."""
        checker = self.checker
        weight = checker.concept_embeds
        pixels = self.preprocess(samples.to(weight.device)).to(weight.dtype)
        pooled = checker.vision_model(pixel_values=pixels).pooler_output
        image = unit(checker.visual_projection(pooled))
        special = image @ unit(checker.special_care_embeds).T - checker.special_care_embeds_weights
        excess = image @ unit(checker.concept_embeds).T - checker.concept_embeds_weights
        care = CARE * (special > 0).any(1).to(excess.dtype)
        worst: Tensor = excess.amax(1) + care
        return -worst.to(samples.device)
