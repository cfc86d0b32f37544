"""BLIP's image-grounded text encoder in transformers' classes, from its authors' weights.

Li et al. 2022, "BLIP: bootstrapping language-image pre-training". The authors' vision tower is a
ViT with timm's names, their text encoder a BERT with cross-attention; transformers has the same
networks under other names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from mmalign.rewards._weights import load_into
from mmalign.types import InputError

HEAD_WIDTH = 64
"""Width of an attention head in every ViT of BLIP."""
VISION_NAMES = (
    (r"cls_token$", "embeddings.class_embedding"),
    (r"pos_embed$", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"norm\.", "post_layernorm."),
    (r"blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)
TEXT_OPTIONS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *("intermediate_size", "max_position_embeddings", "layer_norm_eps", "pad_token_id"),
)


class BlipTextEncoder(nn.Module):
    """What a text means beside an image: the last hidden state of its first token."""

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig) -> None:
        """Build the networks."""
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) and tokens (B, L); returns (B, D)."""
        patches = self.vision(pixel_values=pixels).last_hidden_state
        output = self.text(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=patches,
            is_decoder=False,
        )
        first: Tensor = output.last_hidden_state[:, 0]
        return first


def load_blip(tensors: Mapping[str, Tensor], med_config: Path, where: Path) -> BlipTextEncoder:
    """Build the encoder from weights `visual_encoder.*` and `text_encoder.*`.

    Args:
        tensors: weights in the authors' names; others than these two groups are not read.
        med_config: their JSON file with the sizes of the text encoder.
        where: of the weights, for messages.

    Raises:
        InputError: if weights are missing or do not fit the sizes.
    """
    vision = _vision(tensors, where)
    text = {
        name.removeprefix("text_encoder."): value
        for name, value in tensors.items()
        if name.startswith("text_encoder.") and not name.endswith("position_ids")
    }
    width = vision["embeddings.class_embedding"].shape[-1]
    encoder = BlipTextEncoder(_vision_config(vision, where), _text_config(med_config, width))
    load_into(encoder.vision, vision, where)
    load_into(encoder.text, text, where)
    return encoder.eval().requires_grad_(False)


def _vision(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    renamed = {}
    for name, value in tensors.items():
        if name.startswith("visual_encoder."):
            renamed[_rename(name.removeprefix("visual_encoder."))] = value
    for name, dims in (("class", 3), ("position", 3)):
        if getattr(renamed.get(f"embeddings.{name}_embedding"), "ndim", 0) != dims:
            raise InputError(f"{where} has no weights of BLIP's vision tower (visual_encoder.*)")
    return renamed


def _rename(name: str) -> str:
    for pattern, replacement in VISION_NAMES:
        new, count = re.subn(rf"^{pattern}", replacement, name)
        if count:
            return new
    return name


def _vision_config(weights: Mapping[str, Tensor], where: Path) -> BlipVisionConfig:
    patches = weights["embeddings.position_embedding"].shape[1] - 1
    kernel = weights.get("embeddings.patch_embedding.weight")
    hidden = weights.get("encoder.layers.0.mlp.fc1.weight")
    if kernel is None or kernel.ndim != 4 or hidden is None:
        raise InputError(f"{where} has no weights of BLIP's vision tower (visual_encoder.*)")
    depth = len([name for name in weights if name.endswith("self_attn.qkv.weight")])
    return BlipVisionConfig(
        hidden_size=kernel.shape[0],
        intermediate_size=hidden.shape[0],
        num_hidden_layers=depth,
        num_attention_heads=kernel.shape[0] // HEAD_WIDTH,
        image_size=round(patches**0.5) * kernel.shape[2],
        patch_size=kernel.shape[2],
        layer_norm_eps=1e-6,  # of timm; transformers starts from 1e-5
    )


def _text_config(path: Path, encoder_width: int) -> BlipTextConfig:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        options = {name: content[name] for name in TEXT_OPTIONS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not BLIP's med_config.json: {type(error).__name__}: {error}"
        ) from error
    return BlipTextConfig(**options, encoder_hidden_size=encoder_width, is_decoder=True)
