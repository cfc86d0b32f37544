"""ImageReward: how people rate an image for its prompt.

Xu et al. 2023, "ImageReward: learning and evaluating human preferences for text-to-image
generation", section 2.3: BLIP (ViT-L) with a head on the first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor

from mmalign.config import as_path
from mmalign.rewards._blip import load_blip
from mmalign.rewards._clip_preprocess import ClipPreprocess
from mmalign.rewards._heads import linear_chain
from mmalign.rewards._pretrained import load_part
from mmalign.rewards._weights import find_file, load_tensors, to_dtype
from mmalign.types import InputError, Modality

PUBLISHED = "THUDM/ImageReward"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's output over the authors' data: rewards are standardized."""
MAX_TOKENS = 35
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ImageRewardReward:
    """Standardized output of a head on BLIP's first token, which has seen text and image.

        r(x, c) = (MLP(h_0(x, c)) - m) / s

    Without bounds, standardized over the authors' data. The head is a chain of linear maps, without
    activations. Prompt as it is, padded or cut to 35 tokens of BERT; images: short side to 224
    (bicubic), centre crop. Differentiable with respect to the image.
    """

    name = "imagereward"
    modality: Modality = "image"
    differentiable = True
    range = (float("-inf"), float("inf"))

    def __init__(
        self,
        checkpoint: str = PUBLISHED,
        med_config: str | None = None,
        tokenizer: str = "google-bert/bert-base-uncased",
        dtype: str = "float32",
        device: str = "cpu",
    ) -> None:
        """Load the model.

        Args:
            checkpoint: `ImageReward.pt`, a folder that has it, or a hub id.
            med_config: `med_config.json`, if not beside the checkpoint.
            tokenizer: folder or hub id of BERT's uncased tokenizer.
            dtype: of the weights: float32, float16, bfloat16 or float64.
            device: torch device.

        Raises:
            InputError: if a file is missing, damaged, pickled, or does not fit the others.
        """
        path = find_file(checkpoint, "ImageReward.pt")
        config = find_file(med_config or _home(checkpoint), "med_config.json")
        tensors = load_tensors(path)
        blip = {n.removeprefix("blip."): v for n, v in tensors.items() if n.startswith("blip.")}
        head = {n: v for n, v in tensors.items() if n.startswith("mlp.")}
        self.encoder = load_blip(blip, config, path).to(device, to_dtype(dtype))
        self.head = linear_chain(head, path).to(device, to_dtype(dtype))
        if next(self.head.parameters()).shape[1] != self.encoder.text.config.hidden_size:
            raise InputError(f"{path}: the head does not read what {config} describes")
        self.tokenizer = load_part(transformers.BertTokenizer, tokenizer)
        self.tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        self.tokenizer.add_tokens("[ENC]", special_tokens=True)
        if len(self.tokenizer) > self.encoder.text.config.vocab_size:
            raise InputError(
                f"tokenizer {tokenizer} has {len(self.tokenizer)} tokens, {path} only "
                f"{self.encoder.text.config.vocab_size}"
            )
        side = self.encoder.vision.config.image_size
        self.preprocess = ClipPreprocess(size=(side, side), mean=CLIP_MEAN, std=CLIP_STD)

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1]; returns (B,) on the images' device."""
        weight = next(self.head.parameters())
        pixels = self.preprocess(samples.to(weight.device)).to(weight.dtype)
        first = self.encoder(pixels, *self._tokens(prompts, weight.device))
        values: Tensor = self.head(first)[:, 0]
        values = values.float() if values.element_size() < 4 else values
        return ((values - MEAN) / STD).to(samples.device)

    def _tokens(self, prompts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        encoded = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        return encoded["input_ids"].to(device), encoded["attention_mask"].to(device)


def _home(checkpoint: str) -> str:
    path: Path = as_path(checkpoint)
    return str(path.parent) if path.is_file() else checkpoint
