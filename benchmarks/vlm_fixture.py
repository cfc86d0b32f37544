"""What `vlm_dpo.py` trains on: a small random LLaVA with LLaVA-1.5-7B's proportions, and pairs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mmalign.config import VlmLoraConfig
from mmalign.vlm_lora import attach_vlm_lora, save_vlm_lora

PAIRS = 12
WIDTH, LAYERS, VOCABULARY, PATCH = 384, 8, 1024, 14
RANK, ALPHA = 8, 16.0
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<s>USER: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}"
    "{% endfor %}{% for part in message['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% else %} ASSISTANT: "
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT: {% endif %}"
)


def lora_settings() -> VlmLoraConfig:
    """Make the options of the LoRA of every side."""
    return VlmLoraConfig(rank=RANK, alpha=ALPHA)


def build(folder: Path, image_tokens: int) -> None:
    """Save a random LLaVA, its initial LoRA as mmalign draws it, and pairs."""
    torch.manual_seed(0)
    words = vocabulary()
    tokenizer = build_tokenizer(words)
    side = PATCH * int(image_tokens**0.5)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=128,
                intermediate_size=512,
                num_hidden_layers=5,
                num_attention_heads=2,
                image_size=side,
                patch_size=PATCH,
            ),
            text_config=LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=WIDTH,
                intermediate_size=1032,
                num_hidden_layers=LAYERS,
                num_attention_heads=6,
                max_position_embeddings=1024,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            ),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
    )
    model.save_pretrained(folder / "model")
    LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder / "model")
    attach_vlm_lora(model, lora_settings(), 0)
    save_vlm_lora(model, folder / "lora", str(folder / "model"))
    write_pairs(folder, tokenizer, words)


def vocabulary() -> list[str]:
    """Make up words."""
    chosen = random.Random(0)
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    return sorted({"".join(chosen.choices(syllables, k=3)) for _ in range(600)})


def build_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(["USER: ASSISTANT:", *words])] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )


def write_pairs(folder: Path, tokenizer: Any, words: list[str]) -> None:
    """Write pairs with photographs' size of noise; answers have 60 to 120 tokens."""
    chosen, noise = random.Random(1), np.random.default_rng(1)

    def text(size: int) -> str:
        said = ""
        while len(tokenizer(said)["input_ids"]) < size:
            said += (" " if said else "") + chosen.choice(words)
        return said

    lines = []
    for number in range(PAIRS):
        coarse = noise.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        name = f"{number}.jpg"
        Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(folder / name)
        answers = [text(chosen.randint(60, 120) - 1) for _ in range(2)]
        row = {"pair_id": name, "image": name, "prompt": text(12)}
        lines.append(json.dumps({**row, "chosen": answers[0], "rejected": answers[1]}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
