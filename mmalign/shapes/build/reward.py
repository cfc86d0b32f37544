"""The open_clip model of Shapes world: the differentiable reward that trainings may use."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from mmalign.shapes.build.loop import train
from mmalign.shapes.build.near_miss import spoil, spoil_scene
from mmalign.shapes.build.scenes import pixels, training_scenes
from mmalign.shapes.build.text import HEADS, LAYERS, WIDTH, tokenize
from mmalign.shapes.build.tokenizer import CONTEXT
from mmalign.shapes.captions import describe
from mmalign.shapes.scene import (
    BACKGROUNDS,
    CANVAS,
    COLORS,
    SHAPES,
    Scene,
    SceneObject,
)

STEPS = 6500
BATCH = 48
EMBEDDING = 128
PATCH = 8
VISION_WIDTH = 80
NOISE = 0.1  # standard deviation of pixel noise, in units of [-1, 1]
NEGATIVES = 2  # near-miss captions per picture
SEEING_WEIGHT = 0.3
_GRID = CANVAS // PATCH
_NOTHING = len(COLORS) * len(SHAPES)


def model_config(tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """Describe the architecture in open_clip's `open_clip_config.json` form."""
    return {
        "model_cfg": {
            "embed_dim": EMBEDDING,
            "vision_cfg": {
                "image_size": CANVAS,
                "layers": 4,
                "width": VISION_WIDTH,
                "head_width": 20,
                "patch_size": PATCH,
            },
            "text_cfg": {
                "context_length": CONTEXT,
                "vocab_size": len(tokenizer),
                "width": WIDTH,
                "heads": HEADS,
                "layers": LAYERS,
                "hf_tokenizer_name": ".",
            },
        },
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    }


class Seeing(nn.Module):
    """Read-outs that teach the vision tower what a picture shows; only the tower is kept.

    Every patch names the object over its centre, and the embedding counts the objects of each color
    and shape and names the background.
    """

    def __init__(self) -> None:
        """Make untrained read-outs."""
        super().__init__()
        self.patches = nn.Linear(VISION_WIDTH, _NOTHING + 1)
        self.counts = nn.Linear(EMBEDDING, _NOTHING)
        self.background = nn.Linear(EMBEDDING, len(BACKGROUNDS))

    def forward(self, embedding: Tensor, patches: Tensor, scenes: Sequence[Scene]) -> Tensor:
        """Return the sum of the three errors: embedding (N, E), patches (N, P, D)."""
        here = torch.tensor([_over_patches(scene) for scene in scenes])
        counts = torch.zeros(len(scenes), _NOTHING)
        for row, scene in enumerate(scenes):
            for item in scene.objects:
                counts[row, _kind(item)] += 1
        grounds = torch.tensor([list(BACKGROUNDS).index(scene.background) for scene in scenes])
        loss: Tensor = (
            F.cross_entropy(self.patches(patches).flatten(0, 1), here.flatten())
            + F.mse_loss(self.counts(embedding), counts) * _NOTHING
            + F.cross_entropy(self.background(embedding), grounds)
        )
        return loss


def _kind(item: SceneObject) -> int:
    return list(COLORS).index(item.color) * len(SHAPES) + SHAPES.index(item.shape)


def _over_patches(scene: Scene) -> list[int]:
    """Name the kind of object over the centre of each patch, row by row."""
    centres = [(index + 0.5) * PATCH for index in range(_GRID)]
    kinds = []
    for y, x in itertools.product(centres, centres):
        over = [i for i in scene.objects if math.hypot(i.x - x, i.y - y) < i.radius]
        kinds.append(_kind(over[-1]) if over else _NOTHING)
    return kinds


def build_reward(
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    work: Path,
    seed: int,
    steps: int = STEPS,
) -> open_clip.CLIP:
    """Train the two towers contrastively among near misses on both sides.

    Each picture also meets captions with one thing wrong, and each caption also meets a picture
    with one thing wrong: ranking pictures for one caption is what a reward is for.
    """
    torch.manual_seed(seed)
    text_cfg = model_config(tokenizer)["model_cfg"]["text_cfg"] | {"hf_tokenizer_name": None}
    model = open_clip.CLIP(**(model_config(tokenizer)["model_cfg"] | {"text_cfg": text_cfg}))
    model.load_state_dict(text_tower(text_encoder), strict=False)
    seeing = Seeing()
    model.visual.output_tokens = True

    def loss_at(step: int) -> Tensor:
        rng = random.Random(f"{seed}/reward/{step}")
        scenes = training_scenes(seed + 1, step, BATCH)
        truths = [describe(scene, rng) for scene in scenes]
        near = [spoil_scene(s, t, rng) for s, t in zip(scenes, truths, strict=True)]
        wrong = [spoil(truth, rng) for truth in truths for _ in range(NEGATIVES)]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        images = pixels([*scenes, *near])
        images = images + NOISE * rng.random() * torch.randn(images.shape, generator=generator)
        embedding, patches = model.visual(images)
        tokens = tokenize(tokenizer, [item.text for item in (*truths, *wrong)])
        text_features = model.encode_text(tokens, normalize=True)
        logits = F.normalize(embedding, dim=-1) @ text_features.T
        logits = model.logit_scale.exp().clamp(max=100) * logits
        labels = torch.arange(BATCH)
        to_text = F.cross_entropy(logits[:BATCH], labels)
        to_image = F.cross_entropy(logits[:, :BATCH].T, labels)
        seen = seeing(embedding, patches, [*scenes, *near])
        loss: Tensor = to_text + to_image + SEEING_WEIGHT * seen
        return loss

    train(
        "reward",
        nn.ModuleDict({"model": model, "seeing": seeing}),
        loss_at,
        steps=steps,
        learning_rate=1e-3,
        state_file=work / "reward.pt",
    )
    model.visual.output_tokens = False
    model.eval()
    return model


def text_tower(encoder: CLIPTextModel) -> dict[str, Tensor]:
    """Name the weights of a transformers text encoder as open_clip's text tower does."""
    source = encoder.state_dict()
    tower = {
        "token_embedding.weight": source["embeddings.token_embedding.weight"],
        "positional_embedding": source["embeddings.position_embedding.weight"],
        "ln_final.weight": source["final_layer_norm.weight"],
        "ln_final.bias": source["final_layer_norm.bias"],
    }
    parts = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for layer, kind in itertools.product(range(LAYERS), ("weight", "bias")):
        there, here = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
        for name, old in parts.items():
            tower[f"{there}.{name}.{kind}"] = source[f"{here}.{old}.{kind}"]
        tower[f"{there}.attn.in_proj_{kind}"] = torch.cat(
            [source[f"{here}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
        )
    return tower


def save_reward(model: nn.Module, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write a folder that `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(model_config(tokenizer), indent=2)
    (folder / "open_clip_config.json").write_text(config + "\n")
    tensors = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    tokenizer.save_pretrained(folder)
