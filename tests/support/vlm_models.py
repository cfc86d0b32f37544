"""Tiny random vision-language checkpoints in transformers' real folder format, built offline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

WIDTH = 16
CONTEXT = 160
WORDS = (
    "Yes No yes no What is in the picture? A red circle and blue square. USER ASSISTANT Describe"
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)


def make_tokenizer(special: tuple[str, ...], **options: Any) -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer on a few words, so that any text has tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<pad>", "<s>", "</s>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 50, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        additional_special_tokens=list(special),
        **options,
    )


def save_llava(folder: Path, *, template: str | None = LLAVA_TEMPLATE, **text: Any) -> Path:
    tokenizer = make_tokenizer(("<image>",), bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=_clip_vision(),
        text_config=_llama(tokenizer, **text),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    return _save(folder, LlavaForConditionalGeneration(config), processor)


def save_llava_next(folder: Path) -> Path:
    tokenizer = make_tokenizer(("<image>",), bos_token="<s>", eos_token="</s>")
    torch.manual_seed(1)
    grid = [[28, 56], [56, 28], [56, 56]]
    config = LlavaNextConfig(
        vision_config=_clip_vision(),
        text_config=_llama(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grid,
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 28},
            crop_size={"height": 28, "width": 28},
            image_grid_pinpoints=grid,
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    return _save(folder, LlavaNextForConditionalGeneration(config), processor)


def save_qwen(folder: Path, version: str) -> Path:
    """Save Qwen2-VL (`2`), Qwen2.5-VL (`2.5`) or Qwen3-VL (`3`)."""
    tokenizer = make_tokenizer(QWEN_SPECIAL, eos_token="<|im_end|>")
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in QWEN_SPECIAL}
    torch.manual_seed(2)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 2 * WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2]},
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": tokenizer.pad_token_id,
    }
    common: dict[str, Any] = {
        "text_config": text,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    vision: dict[str, Any] = {"depth": 3, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2}
    images = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 8)
    model: Any
    processor: Any
    if version == "2":
        vision |= {"embed_dim": WIDTH, "hidden_size": 2 * WIDTH}
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(vision_config=vision, **common))
        processor = Qwen2VLProcessor(
            images, tokenizer, Qwen2VLVideoProcessor(), chat_template=QWEN_TEMPLATE
        )
    elif version == "2.5":
        vision |= {"hidden_size": WIDTH, "intermediate_size": WIDTH, "out_hidden_size": 2 * WIDTH}
        vision |= {"fullatt_block_indexes": [1], "window_size": 56}
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=vision, **common))
        processor = Qwen2_5_VLProcessor(
            images, tokenizer, Qwen2VLVideoProcessor(), chat_template=QWEN_TEMPLATE
        )
    else:
        text["head_dim"] = WIDTH
        vision |= {"hidden_size": WIDTH, "intermediate_size": WIDTH, "out_hidden_size": 2 * WIDTH}
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(vision_config=vision, **common))
        processor = Qwen3VLProcessor(
            images, tokenizer, Qwen3VLVideoProcessor(), chat_template=QWEN_TEMPLATE
        )
    return _save(folder, model, processor)


def edited(source: Path, folder: Path, file: str, **changes: Any) -> Path:
    """Copy a checkpoint with other values in one of its files of JSON."""
    shutil.copytree(source, folder)
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **changes}))
    return folder


def _clip_vision() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )


def _llama(tokenizer: PreTrainedTokenizerFast, **more: Any) -> LlamaConfig:
    options: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 2 * WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return LlamaConfig(**{**options, **more})


def _save(folder: Path, model: Any, processor: Any) -> Path:
    # Random weights of the usual size make every token as likely as any other; larger ones tell
    # a wrong position or image from the right one.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
