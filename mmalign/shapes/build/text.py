"""The text encoder of Shapes world: it learns to read captions before anything is drawn.

A text encoder trained from nothing together with a small denoiser separates words slowly. Here it
is first taught to answer what a caption says, as the encoder of Stable Diffusion comes from CLIP.
The generator keeps it frozen; the reward model starts from it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mmalign.shapes.build.loop import train
from mmalign.shapes.build.scenes import training_scenes
from mmalign.shapes.build.tokenizer import CONTEXT
from mmalign.shapes.captions import NUMBERS, PLACES, RELATIONS, Description, describe
from mmalign.shapes.scene import BACKGROUNDS, COLORS, SHAPES, SIZES

STEPS = 2000
BATCH = 128
WIDTH = 64
LAYERS = 3
HEADS = 4
SLOTS = 4
_PHRASE = re.compile(
    rf"\b(a|an|{'|'.join(NUMBERS)})(?: ({'|'.join(SIZES)}))? ({'|'.join(COLORS)})"
    rf" ({'|'.join(SHAPES)})(?:e?s)?\b"
)
_WORD = re.compile(r"\w+|[^\w\s]+")


class Phrase(NamedTuple):
    """One noun phrase: the position of its noun among the tokens and its attributes as classes."""

    token: int
    color: int
    shape: int
    size: int
    number: int


QUESTIONS = {"color": len(COLORS), "shape": len(SHAPES), "size": len(SIZES) + 1, "number": SLOTS}
"""What every noun phrase answers, with the number of answers; the last size is "not said"."""
STATEMENTS = {
    "relation": tuple(RELATIONS),
    "place": tuple(PLACES),
    "background": tuple(BACKGROUNDS),
}
"""What a whole caption may state; one more class stands for "not stated"."""


def phrases(text: str) -> list[Phrase]:
    """Find the noun phrases of a caption; every word is one token, after the start token."""
    found = []
    for match in _PHRASE.finditer(text):
        number, size, color, shape = match.groups()
        found.append(
            Phrase(
                token=len(_WORD.findall(text[: match.end()])),
                color=list(COLORS).index(color),
                shape=SHAPES.index(shape),
                size=list(SIZES).index(size) if size else len(SIZES),
                number=NUMBERS.get(number, 1) - 1,
            )
        )
    return found


class Reader(nn.Module):
    """A text encoder with the linear read-outs that teach it; only the encoder is kept.

    Each noun's token answers for its own phrase, and the end token answers for every phrase in
    order and for the statements.
    """

    def __init__(self, encoder: CLIPTextModel) -> None:
        """Put untrained read-outs on `encoder`."""
        super().__init__()
        self.encoder = encoder
        self.noun = nn.ModuleDict({k: nn.Linear(WIDTH, n) for k, n in QUESTIONS.items()})
        # One more answer for slots that the caption leaves empty.
        self.slots = nn.ModuleDict(
            {k: nn.Linear(WIDTH, SLOTS * (n + 1)) for k, n in QUESTIONS.items()}
        )
        self.statements = nn.ModuleDict(
            {k: nn.Linear(WIDTH, len(names) + 1) for k, names in STATEMENTS.items()}
        )

    def forward(self, tokens: Tensor, captions: Sequence[Description]) -> Tensor:
        """Return the mean cross-entropy of all read-outs on a batch of captions."""
        states: Tensor = self.encoder(tokens).last_hidden_state
        found = [phrases(caption.text) for caption in captions]
        rows = torch.tensor([row for row, items in enumerate(found) for _ in items])
        places = torch.tensor([item.token for items in found for item in items])
        nouns = states[rows, places]
        end = states[torch.arange(len(tokens)), tokens.argmax(-1)]
        losses = []
        for name, answers in QUESTIONS.items():
            truth = torch.tensor([getattr(item, name) for items in found for item in items])
            losses.append(F.cross_entropy(self.noun[name](nouns), truth))
            slots = torch.full((len(found), SLOTS), answers)
            for row, items in enumerate(found):
                for slot, item in enumerate(items):
                    slots[row, slot] = getattr(item, name)
            logits = self.slots[name](end).view(-1, answers + 1)
            losses.append(F.cross_entropy(logits, slots.flatten()))
        for name, names in STATEMENTS.items():
            stated = [getattr(caption, name) for caption in captions]
            truth = torch.tensor([names.index(s) if s else len(names) for s in stated])
            losses.append(F.cross_entropy(self.statements[name](end), truth))
        return torch.stack(losses).mean()


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Make an untrained CLIP text model over `tokenizer`."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            max_position_embeddings=CONTEXT,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Turn captions into token ids (N, L), padded to the context length."""
    ids: Tensor = tokenizer(
        list(captions),
        padding="max_length",
        truncation=True,
        max_length=CONTEXT,
        return_tensors="pt",
    ).input_ids
    return ids


def build_text_encoder(
    tokenizer: CLIPTokenizer, work: Path, seed: int, steps: int = STEPS
) -> CLIPTextModel:
    """Train the text encoder to read captions of training compositions."""
    torch.manual_seed(seed)
    reader = Reader(new_text_encoder(tokenizer))

    def loss_at(step: int) -> Tensor:
        rng = random.Random(f"{seed}/reader/{step}")
        captions = [describe(scene, rng) for scene in training_scenes(seed + 2, step, BATCH)]
        loss: Tensor = reader(tokenize(tokenizer, [c.text for c in captions]), captions)
        return loss

    train(
        "text encoder",
        reader,
        loss_at,
        steps=steps,
        learning_rate=1e-3,
        state_file=work / "text.pt",
    )
    return reader.encoder.eval()
