"""MPS: multi-dimensional preference score.

Zhang et al. 2024, "Learning multi-dimensional human preference for text-to-image generation",
section 4: CLIP-H whose image tokens attend to those words of the prompt that a condition names.
"""

from __future__ import annotations

from collections.abc import Sequence

import transformers
from torch import Tensor

from mmalign.rewards._mps_network import CrossModel
from mmalign.rewards._pretrained import (
    PretrainedClip,
    load_config,
    load_part,
    load_preprocess,
    unit,
)
from mmalign.rewards._weights import find_file, load_into, load_tensors, to_dtype
from mmalign.types import InputError, Modality

BASE = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
FILE = "MPS_overall.safetensors"
OVERALL = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, "
    "structure, instance, texture, quantity, attributes, position, number, location, word, things."
)
"""The condition of the published checkpoint, which was trained on overall preferences."""


class MpsReward:
    """Scaled cosine similarity of the prompt and the image tokens that looked at its words.

        r(x, c) = exp(s) <h_0(F(x), G(c), M), g(c)> / (|h_0| |g(c)|)

    F and G are all image and text tokens, projected; h is four layers of cross- and self-attention;
    the mask M hides words whose largest dot product with a word of the condition is at most
    `threshold` times that of the prompt's most similar word. Prompt and condition as they are, cut
    to 77 tokens; images: short side to 224 (bicubic), centre crop. Differentiable with respect to
    the image.

    The authors publish a pickled Python object, which is never loaded. Convert it once where you
    trust it, with their code importable:

        model = torch.load("MPS_overall_checkpoint.pth", weights_only=False)
        save_file(model.float().state_dict(), "MPS_overall.safetensors")

    A `.pth` file that holds the state dict alone is read as well.
    """

    name = "mps"
    modality: Modality = "image"
    differentiable = True

    def __init__(
        self,
        checkpoint: str,
        base: str = BASE,
        condition: str = OVERALL,
        threshold: float = 0.3,
        dtype: str = "float32",
        device: str = "cpu",
    ) -> None:
        """Load the model.

        Args:
            checkpoint: state dict with `model.*` (CLIP in transformers' names) and `cross_model.*`,
                or a folder or hub id that has it as `MPS_overall.safetensors`.
            base: folder or hub id with CLIP's config.json, tokenizer and image processor; its
                weights are not read.
            condition: words that matter.
            threshold: 0.3 as in the authors' evaluation scripts; their model's own forward, which
                trained it and which their README calls, has 0.01.
            dtype: of the weights: float32, float16, bfloat16 or float64.
            device: torch device.

        Raises:
            InputError: if a file is missing, damaged, pickled, or does not fit the others.
        """
        if not threshold < 1:
            raise InputError(f"reward mps: threshold {threshold} hides every word; use below 1")
        path = find_file(checkpoint, FILE)
        tensors = load_tensors(path)
        clip, cross = (
            {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
            for prefix in ("model.", "cross_model.")
        )
        clip = {n: v for n, v in clip.items() if not n.endswith("position_ids")}
        network = transformers.CLIPModel(load_config(transformers.CLIPConfig, base))
        load_into(network, clip, path)
        self.cross = CrossModel.from_tensors(cross, path)
        if self.cross.width != network.config.projection_dim:
            raise InputError(f"{path}: cross_model does not read what the CLIP of {base} makes")
        for module in (network, self.cross):
            module.to(device=device, dtype=to_dtype(dtype)).eval().requires_grad_(False)
        tokenizer = load_part(transformers.AutoTokenizer, base)
        self.clip = PretrainedClip(network, tokenizer, load_preprocess(base))
        self.condition, self.threshold = condition, threshold
        self.scale = float(network.logit_scale.detach().double().exp())
        self.range = (-self.scale, self.scale)

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1]; returns (B,) on the images' device."""
        clip = self.clip.model
        patches = clip.vision_model(pixel_values=self.clip.pixels(samples)).last_hidden_state
        words, sentence = self._read(prompts)
        hidden = self._unwanted(words)
        looked = self.cross(clip.visual_projection(patches), words, hidden)[:, 0]
        return (self.scale * (unit(looked) * unit(sentence)).sum(-1)).to(samples.device)

    def _read(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Project every token (B, L, D) and the end token (B, D); padding is not masked."""
        tokens = self.clip.tokens(texts, padding="max_length")
        output = self.clip.model.text_model(input_ids=tokens["input_ids"])
        project = self.clip.model.text_projection
        return project(output.last_hidden_state), project(output.pooler_output)

    def _unwanted(self, words: Tensor) -> Tensor:
        """Mark the words (B, L) that the condition does not name."""
        condition, _ = self._read([self.condition])
        similarity = (words @ condition[0].T).amax(-1)
        return ~(similarity / similarity.amax(-1, keepdim=True) > self.threshold)
