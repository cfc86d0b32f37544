"""VQAScore: does a vision-language model say that the image shows the prompt?

Lin et al. 2024, "Evaluating text-to-visual generation with image-to-text generation", section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from mmalign.config import VlmModelConfig
from mmalign.types import InputError, Modality, Question, VlmAdapter

TEMPLATE = 'Does this figure show "{}"? Please answer yes or no.'


class VqaScoreReward:
    """Probability that a vision-language model answers "yes" to a question about the image.

        r(x, c) = P("yes" | x, "Does this figure show "c"? Please answer yes or no.")

    P is summed over the tokens that say yes in any case, with or without a space before; the
    authors take the one token of "Yes". Images are prepared by the model's own processor. Not
    differentiable. A LLaVA or Qwen-VL model of a few billion weights is a slow scorer: for training
    serve it from another process (`http`).
    """

    name = "vqascore"
    modality: Modality = "image"
    differentiable = False
    range = (0.0, 1.0)

    def __init__(
        self,
        model: str | VlmAdapter,
        template: str = TEMPLATE,
        relative: bool = False,
        batch_size: int = 8,
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
        device: str = "cpu",
    ) -> None:
        """Load the model.

        Args:
            model: LLaVA or Qwen-VL checkpoint in transformers' format, a hub id, or any adapter.
            template: question, with {} where the prompt goes.
            relative: divide by the probability of yes or no, for models that answer at length.
            batch_size: questions asked at a time.
            dtype: of the weights.
            device: torch device.

        Raises:
            InputError: if the model cannot be loaded, or the template has not one {}.
        """
        if template.count("{}") != 1:
            raise InputError(f"reward vqascore: template {template!r} must have one {{}}")
        if batch_size < 1:
            raise InputError("reward vqascore: batch_size must be positive")
        if isinstance(model, str):
            from mmalign.adapters import load_vlm

            model = load_vlm(VlmModelConfig(model=model, dtype=dtype), device)
        self.vlm: VlmAdapter = model
        self.template, self.relative, self.batch_size = template, relative, batch_size

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1]; returns (B,) on the images' device.

        Raises:
            InputError: if an image or a prompt cannot be used.
        """
        pixels = (samples.detach().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
        questions = [
            Question(self.template.replace("{}", prompt), (Image.fromarray(image.numpy()),))
            for image, prompt in zip(pixels.permute(0, 2, 3, 1), prompts, strict=True)
        ]
        answers = torch.tensor(self.vlm.yes_no(questions, self.batch_size))
        yes = answers[:, 0]
        return (yes / answers.sum(1) if self.relative else yes).to(samples.device)
