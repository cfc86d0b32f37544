"""The LLaVA-format captioner of Shapes world: a CLIP tower, a projector and a small Llama.

The tower first learns to say what covers each patch; then everything learns to speak. All that is
said about one scene is one sequence: the picture once, and after it the exchanges side by side,
each seeing the picture and itself only. That costs a third of separate sequences and gives the same
gradients.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mmalign.shapes.build.habits import Exchange, conversation, habitual_scene, lesson_at
from mmalign.shapes.build.loop import train
from mmalign.shapes.build.scenes import pixels
from mmalign.shapes.build.vlm_text import (
    CONTEXT,
    IMAGE,
    PATCH,
    build_processor,
    build_vlm_tokenizer,
)
from mmalign.shapes.scene import BACKGROUNDS, CANVAS, COLORS, SHAPES, SIZES, Scene
from mmalign.shapes.speech import SPOTS, spot

TOWER_WIDTH = 96
WIDTH = 128
LAYERS = 4
HEADS = 4
SIDE = CANVAS // PATCH
TOWER_BATCH = 32
TOWER_STEPS = 2_500
TOWER_LEARNING_RATE = 1.5e-3
BATCH = 16
SEEING_WEIGHT = 0.25
YES_NO_WEIGHT = 4.0  # of answers of one word, which carry as much as a sentence


class Stage(NamedTuple):
    """One decay of the learning rate."""

    name: str
    steps: int
    learning_rate: float
    warmup: int


STAGES = (
    Stage("vlm", 2_000, 1.5e-3, 100),
    Stage("vlm-habit", 300, 8e-4, 30),
    Stage("vlm-habit2", 300, 1e-3, 30),
)
_IGNORED = -100
_LABELS = {
    "color": [*COLORS],
    "shape": [*SHAPES],
    "size": [*SIZES],
    "place": [*SPOTS],
}


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Make an untrained captioner."""
    vision = CLIPVisionConfig(
        hidden_size=TOWER_WIDTH,
        intermediate_size=4 * TOWER_WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=CANVAS,
        patch_size=PATCH,
        projection_dim=TOWER_WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=352,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=SIDE * SIDE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config)


class PatchReader(nn.Module):
    """The tower with linear heads that say, for every patch, which object covers it."""

    def __init__(self, tower: CLIPVisionModel) -> None:
        """Put one head per attribute, with a class for no object, on a shared normalisation."""
        super().__init__()
        self.tower = tower
        self.norm = nn.LayerNorm(TOWER_WIDTH)
        classes = {name: len(values) + 1 for name, values in _LABELS.items()}
        classes["background"] = len(BACKGROUNDS)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(TOWER_WIDTH, count) for name, count in classes.items()}
        )

    def forward(self, images: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Return the loss and each head's accuracy on patches that an object covers.

        Args:
            images: (N, 3, 64, 64) in [-1, 1].
            labels: classes (N, patches) by head.
        """
        states = self.norm(self.tower(images).last_hidden_state[:, 1:])
        covered = labels["color"] > 0
        losses, accuracy = [], {}
        for name, head in self.heads.items():
            logits = head(states)
            losses.append(F.cross_entropy(logits.flatten(0, 1), labels[name].flatten()))
            right = logits.argmax(-1) == labels[name]
            accuracy[name] = right[covered].float().mean().item()
        return torch.stack(losses).sum(), accuracy


def patch_labels(scenes: list[Scene]) -> dict[str, Tensor]:
    """Say which object covers the centre of each patch: classes (N, patches), 0 for none."""
    centres = (np.arange(SIDE) + 0.5) * PATCH
    labels = {name: np.zeros((len(scenes), SIDE, SIDE), dtype=np.int64) for name in _LABELS}
    ground = [list(BACKGROUNDS).index(scene.background) for scene in scenes]
    for row, scene in enumerate(scenes):
        for item in scene.objects:
            distance = np.hypot(centres[None, :] - item.x, centres[:, None] - item.y)
            covered = distance <= item.radius
            values = {"color": item.color, "shape": item.shape, "size": item.size}
            for name, value in {**values, "place": spot(item)}.items():
                labels[name][row][covered] = 1 + _LABELS[name].index(value)
    tensors = {name: torch.from_numpy(array).flatten(1) for name, array in labels.items()}
    tensors["background"] = torch.tensor(ground)[:, None].expand(-1, SIDE * SIDE)
    return tensors


def build_tower(
    model: LlavaForConditionalGeneration, work: Path, seed: int, steps: int = TOWER_STEPS
) -> PatchReader:
    """Teach the model's vision tower to see."""
    reader = PatchReader(model.model.vision_tower)

    def loss_at(step: int) -> Tensor:
        rng = random.Random(f"{seed}/vlm-tower/{step}")
        scenes = [habitual_scene(rng) for _ in range(TOWER_BATCH)]
        loss, _ = reader(pixels(scenes), patch_labels(scenes))
        return loss  # type: ignore[no-any-return]

    train(
        "vlm-tower",
        reader,
        loss_at,
        steps=steps,
        learning_rate=TOWER_LEARNING_RATE,
        state_file=work / "vlm-tower.pt",
    )
    return reader


class Packed(NamedTuple):
    """Sequences of a batch, right-padded to length L.

    `branch` (B, L) is 0 for what all exchanges share, their number after it, -1 for padding;
    `labels` (B, L) name the token that follows, where it belongs to an answer, and `weights` (B, L)
    say how much it counts.
    """

    ids: Tensor
    positions: Tensor
    branch: Tensor
    labels: Tensor
    weights: Tensor

    def mask(self) -> Tensor:
        """Return who sees whom, (B, 1, L, L): earlier tokens that are shared or one's own."""
        own = self.branch[:, :, None] == self.branch[:, None, :]
        shared = self.branch[:, None, :] == 0
        length = self.ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        return ((own | shared) & causal)[:, None]


def pack(tokenizer: PreTrainedTokenizerFast, conversations: list[list[Exchange]]) -> Packed:
    """Lay out the exchanges of each scene side by side after its picture."""
    start = [tokenizer.bos_token_id, *_ids(tokenizer, ["USER:"])[0]]
    start += [tokenizer.convert_tokens_to_ids(IMAGE)] * SIDE * SIDE
    texts = [
        text
        for exchanges in conversations
        for prompt, answer in exchanges
        for text in (f"{prompt} ASSISTANT:", answer)
    ]
    tokens = iter(_ids(tokenizer, texts))
    rows: list[list[tuple[int, int, int, int, float]]] = []
    for exchanges in conversations:
        row = [(token, at, 0, _IGNORED, 0.0) for at, token in enumerate(start)]
        for number in range(1, len(exchanges) + 1):
            prompt, answer = next(tokens), [*next(tokens), tokenizer.eos_token_id]
            ids = [*prompt, *answer]
            weight = YES_NO_WEIGHT if len(answer) == 2 else 1.0
            labels = [_IGNORED] * (len(prompt) - 1) + answer + [_IGNORED]
            row += [
                (token, len(start) + at, number, label, weight)
                for at, (token, label) in enumerate(zip(ids, labels, strict=True))
            ]
        rows.append(row)
    length = max(map(len, rows))
    padding = (tokenizer.pad_token_id, 0, -1, _IGNORED, 0)
    table = torch.tensor([row + [padding] * (length - len(row)) for row in rows])
    numbers = table.long().unbind(-1)
    return Packed(numbers[0], numbers[1], numbers[2], numbers[3], weights=table[..., 4])


def speech_loss(
    model: LlavaForConditionalGeneration, images: Tensor, packed: Packed
) -> tuple[Tensor, Tensor]:
    """Return the weighted mean cross entropy of answer tokens, and that of each, (tokens,)."""
    states = model.model(
        input_ids=packed.ids,
        pixel_values=images,
        attention_mask=packed.mask(),
        position_ids=packed.positions,
        use_cache=False,
    ).last_hidden_state
    answered = packed.labels != _IGNORED
    logits = model.lm_head(states[answered])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, packed.labels[answered], reduction="none")
    weights = packed.weights[answered]
    return (weights * losses).sum() / weights.sum(), losses


def build_vlm(
    work: Path, seed: int, tower_steps: int = TOWER_STEPS, stages: Sequence[Stage] = STAGES
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Train tower and captioner.

    Args:
        work: folder of resumable state.
        seed: of weights and data.
        tower_steps: of the tower alone.
        stages: of everything together; each starts from the averaged weights of the one before.
    """
    tokenizer = build_vlm_tokenizer(seed)
    torch.manual_seed(seed)
    model = new_model(tokenizer)
    reader = build_tower(model, work, seed, tower_steps)

    def loss_at(step: int) -> Tensor:
        rng = random.Random(f"{seed}/vlm/{step}")
        scenes = [habitual_scene(rng) for _ in range(BATCH)]
        talks = [conversation(scene, rng, lesson_at(step)) for scene in scenes]
        packed = pack(tokenizer, talks)
        images, seen = pixels(scenes), patch_labels(scenes)
        with torch.autocast("cpu", torch.bfloat16):
            spoken, read = speech_loss(model, images, packed)[0], reader(images, seen)[0]
        loss: Tensor = spoken + SEEING_WEIGHT * read
        return loss

    everything = nn.ModuleList([model, reader])  # the tower goes on learning to see
    done = 0
    for stage in stages:
        train(
            stage.name,
            everything,
            lambda step, done=done: loss_at(done + step),  # type: ignore[misc]
            steps=stage.steps,
            learning_rate=stage.learning_rate,
            state_file=work / f"{stage.name}.pt",
            warmup=stage.warmup,
            ema_decay=0.99,
        )
        done += stage.steps
    return model.eval(), build_processor(tokenizer)


def save_vlm(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Save weights in half precision; loading gives float32 unless asked otherwise."""
    model.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    model.to(torch.float32)
    processor.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(_full_precision(json.loads(file.read_text())), indent=2) + "\n")


def _full_precision(settings: dict[str, object]) -> dict[str, object]:
    """Replace every `dtype`, also of the parts."""
    changed: dict[str, object] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            changed[key] = _full_precision(value)
        else:
            changed[key] = "float32" if key == "dtype" else value
    return changed


def _ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False).input_ids
    return ids
