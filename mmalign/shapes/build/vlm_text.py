"""The tokenizer and processor of the captioner: byte-pair merges learned on its own sentences."""

from __future__ import annotations

import json
import random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from mmalign.shapes.build.habits import conversation, habitual_scene
from mmalign.shapes.scene import CANVAS

PATCH = 8
CONTEXT = 512
IMAGE, START, END, PAD = "<image>", "<s>", "</s>", "<pad>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '</s>' }}{% endgeneration %}"
    "{% else %}{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}"
    "{% endfor %}{% endif %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""LLaVA 1.5's conversation: `USER: <image>\\nquestion ASSISTANT: answer</s>`."""
_WORDS = Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
_WORD_END = "</w>"


def build_vlm_tokenizer(seed: int, scenes: int = 4000) -> PreTrainedTokenizerFast:
    """Learn merges until every word of the training conversations is one token.

    Tokens carry no spaces, so that the tokens of a prompt and of an answer are those of the two
    joined, however they are spaced. Other text falls back to bytes.
    """
    rng = random.Random(f"{seed}/vlm-tokenizer")
    corpus = ["USER: ASSISTANT: SYSTEM:"] * scenes
    for _ in range(scenes):
        for exchange in conversation(habitual_scene(rng), rng):
            corpus += [exchange.prompt, exchange.answer]
    learner = Tokenizer(BPE(end_of_word_suffix=_WORD_END))
    split = pre_tokenizers.Split(_WORDS, behavior="removed", invert=True)
    encode_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner.pre_tokenizer = pre_tokenizers.Sequence([split, encode_bytes])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=3000,
        initial_alphabet=letters,
        # Named here, or else numbered in another order in every process, which decides ties.
        special_tokens=[f"{byte}{_WORD_END}" for byte in letters],
        end_of_word_suffix=_WORD_END,
        show_progress=False,
    )
    learner.train_from_iterator(corpus, trainer)
    return _wrap(learner, letters)


def _wrap(learner: Tokenizer, letters: list[str]) -> PreTrainedTokenizerFast:
    model = json.loads(learner.to_str())["model"]
    learned = sorted(model["vocab"], key=model["vocab"].__getitem__)
    # Bytes first, in a fixed order: the learner numbers word endings differently in every process.
    words = dict.fromkeys(
        [PAD, START, END, IMAGE, *letters, *(f"{byte}{_WORD_END}" for byte in letters), *learned]
    )
    merges = [tuple(pair) for pair in model["merges"]]
    bpe = BPE(
        vocab={word: index for index, word in enumerate(words)},
        merges=merges,
        end_of_word_suffix=_WORD_END,
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = learner.pre_tokenizer
    start = list(words).index(START)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A",
        pair=f"{START} $A $B",
        special_tokens=[(START, start)],
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_WORD_END, "Ġ"),  # the byte-level name of a space
            decoders.ByteLevel(),
            decoders.Fuse(),
            *(decoders.Replace(f" {mark}", mark) for mark in ".,?!:"),
            # Not `Strip`, which panics at a text of nothing but special tokens.
            decoders.Replace(Regex(" $"), ""),
        ]
    )
    special = (PAD, START, END, IMAGE)
    tokenizer.add_special_tokens([AddedToken(w, special=True, normalized=False) for w in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": IMAGE},
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Put tokenizer and image processor together, as LLaVA 1.5 does."""
    side = {"height": CANVAS, "width": CANVAS}
    images = CLIPImageProcessor(
        size={"shortest_edge": CANVAS},
        crop_size=side,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )
