"""A CLIP tokenizer whose byte-pair merges are learned on Shapes world's own captions."""

from __future__ import annotations

import json
import random

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

from mmalign.shapes.captions import describe
from mmalign.shapes.scene import sample_scene

CONTEXT = 32
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORDS = Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")


def build_tokenizer(seed: int, captions: int = 20_000) -> CLIPTokenizer:
    """Learn merges until every caption word is one token; other text falls back to bytes."""
    rng = random.Random(f"{seed}/tokenizer")
    corpus = [describe(sample_scene(rng, held_out=None), rng).text for _ in range(captions)]
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_WORDS, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = BpeTrainer(
        vocab_size=2000,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(corpus, trainer)
    return _as_clip(learner.to_str())


def _as_clip(serialized: str) -> CLIPTokenizer:
    model = json.loads(serialized)["model"]
    # Every byte can end a word, or a word the captions never used would be cut short by an unknown
    # token. They come before what was learned, because the learner numbers the endings that it met
    # in another order in every process. CLIP pools at the largest token id, so the end token has to
    # come last.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    endings = [f"{byte}</w>" for byte in letters]
    learned = sorted(model["vocab"], key=model["vocab"].__getitem__)
    words = dict.fromkeys([*letters, *endings, *learned, _START, _END])
    vocab = {word: index for index, word in enumerate(words)}
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT)
