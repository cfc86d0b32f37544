"""The open_clip model of Shapes world: the differentiable reward that trainings may use."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from mmalign.shapes.build.loop import train
from mmalign.shapes.build.scenes import pixels, training_scenes
from mmalign.shapes.build.tokenizer import CONTEXT
from mmalign.shapes.captions import RELATIONS, Description, describe
from mmalign.shapes.scene import BACKGROUNDS, COLORS, SHAPES, SIZES

STEPS = 3000
BATCH = 48
NOISE = 0.1  # standard deviation of pixel noise, in units of [-1, 1]
NEGATIVES = 2


def model_config(tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """Describe the architecture in open_clip's `open_clip_config.json` form."""
    return {
        "model_cfg": {
            "embed_dim": 64,
            "vision_cfg": {
                "image_size": 64,
                "layers": 4,
                "width": 80,
                "head_width": 20,
                "patch_size": 8,
            },
            "text_cfg": {
                "context_length": CONTEXT,
                "vocab_size": len(tokenizer),
                "width": 64,
                "heads": 4,
                "layers": 3,
                "hf_tokenizer_name": ".",
            },
        },
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    }


def build_reward(
    tokenizer: CLIPTokenizer, work: Path, seed: int, steps: int = STEPS
) -> open_clip.CLIP:
    """Train the two towers contrastively; each picture also meets captions with one thing wrong."""
    torch.manual_seed(seed)
    text_cfg = model_config(tokenizer)["model_cfg"]["text_cfg"] | {"hf_tokenizer_name": None}
    model = open_clip.CLIP(**(model_config(tokenizer)["model_cfg"] | {"text_cfg": text_cfg}))

    def loss_at(step: int) -> Tensor:
        rng = random.Random(f"{seed}/reward/{step}")
        scenes = training_scenes(seed + 1, step, BATCH)
        truths = [describe(scene, rng) for scene in scenes]
        wrong = [spoil(truth, rng) for truth in truths for _ in range(NEGATIVES)]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        images = pixels(scenes)
        images = images + NOISE * rng.random() * torch.randn(images.shape, generator=generator)
        captions = [item.text for item in (*truths, *wrong)]
        tokens = tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        image_features = model.encode_image(images, normalize=True)
        text_features = model.encode_text(tokens, normalize=True)
        logits = model.logit_scale.exp().clamp(max=100) * image_features @ text_features.T
        labels = torch.arange(BATCH)
        return F.cross_entropy(logits, labels) + F.cross_entropy(logits[:, :BATCH].T, labels)

    train(
        "reward", model, loss_at, steps=steps, learning_rate=1.5e-3, state_file=work / "reward.pt"
    )
    model.eval()
    return model


def spoil(truth: Description, rng: random.Random) -> Description:
    """Change one claim of a description, so that it is a near miss rather than another scene."""
    edits = [_recolor, _reshape, _drop_or_add]
    if len(truth.objects) > 1:
        edits.append(_swap_colors)
    if truth.relation:
        edits.append(_turn_relation)
    if truth.background:
        edits.append(_repaint)
    if any(item.size for item in truth.objects):
        edits.append(_resize)
    spoilt = truth
    while spoilt.text == truth.text:
        spoilt = rng.choice(edits)(truth, rng)
    return spoilt


def _with_object(truth: Description, index: int, **changes: str) -> Description:
    objects = list(truth.objects)
    objects[index] = replace(objects[index], **changes)
    return replace(truth, objects=tuple(objects))


def _recolor(truth: Description, rng: random.Random) -> Description:
    return _with_object(truth, rng.randrange(len(truth.objects)), color=rng.choice(list(COLORS)))


def _reshape(truth: Description, rng: random.Random) -> Description:
    return _with_object(truth, rng.randrange(len(truth.objects)), shape=rng.choice(SHAPES))


def _resize(truth: Description, rng: random.Random) -> Description:
    sized = [index for index, item in enumerate(truth.objects) if item.size]
    return _with_object(truth, rng.choice(sized), size=rng.choice(list(SIZES)))


def _swap_colors(truth: Description, rng: random.Random) -> Description:
    first, second = rng.sample(range(len(truth.objects)), 2)
    swapped = _with_object(truth, first, color=truth.objects[second].color)
    return _with_object(swapped, second, color=truth.objects[first].color)


def _turn_relation(truth: Description, rng: random.Random) -> Description:
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert truth.relation in RELATIONS
    return replace(truth, relation=opposite[truth.relation])


def _repaint(truth: Description, rng: random.Random) -> Description:
    return replace(truth, background=rng.choice(list(BACKGROUNDS)))


def _drop_or_add(truth: Description, rng: random.Random) -> Description:
    objects = list(truth.objects)
    if len(objects) > 1 and rng.random() < 0.5:
        objects.pop(rng.randrange(len(objects)))
    elif len(objects) < 4:
        color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
        objects.append(replace(objects[0], color=color, shape=shape, size=None))
    relation = truth.relation if len(objects) == 2 else None
    place = truth.place if len(objects) == 1 else None
    return replace(truth, objects=tuple(objects), relation=relation, place=place)


def save_reward(model: nn.Module, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write a folder that `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(model_config(tokenizer), indent=2)
    (folder / "open_clip_config.json").write_text(config + "\n")
    tensors = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    tokenizer.save_pretrained(folder)
