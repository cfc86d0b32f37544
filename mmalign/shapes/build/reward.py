"""The open_clip model of Shapes world: the differentiable reward that trainings may use."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from mmalign.shapes.build.decoded import DecodedScenes
from mmalign.shapes.build.loop import train
from mmalign.shapes.build.near_miss import spoil, spoil_scene
from mmalign.shapes.build.scenes import pixels, training_scenes
from mmalign.shapes.build.text import HEADS, LAYERS, WIDTH, tokenize
from mmalign.shapes.build.tokenizer import CONTEXT
from mmalign.shapes.captions import Description, describe
from mmalign.shapes.scene import (
    BACKGROUNDS,
    CANVAS,
    COLORS,
    SHAPES,
    Scene,
    SceneObject,
)

RENDERED_STEPS = 6500
DECODED_STEPS = 3000
RENDERED_BATCH = 48
DECODED_BATCH = 24  # of each kind of pictures
EMBEDDING = 128
PATCH = 8
VISION_LAYERS = 4
VISION_WIDTH = 80
NOISE = 0.1  # standard deviation of pixel noise, in units of [-1, 1]
NEGATIVES = 2  # near-miss captions per picture
LAYOUT_SHARE = 0.4  # of near-miss captions, where the caption says where things are
SEEING_WEIGHT = 0.3
PLACING_WEIGHT = 1.0
_GRID = CANVAS // PATCH
_NOTHING = len(COLORS) * len(SHAPES)


def model_config(tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """Describe the architecture in open_clip's `open_clip_config.json` form."""
    return {
        "model_cfg": {
            "embed_dim": EMBEDDING,
            "vision_cfg": {
                "image_size": CANVAS,
                "layers": VISION_LAYERS,
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


class Placing(nn.Module):
    """A read-out that asks the embedding where things are: places summed by color and by shape.

    At this weight the answer is not learned: the contrastive loss outweighs it, and the embedding
    goes on to say how far things are from the border, but not on which side.
    """

    def __init__(self) -> None:
        """Make an untrained read-out."""
        super().__init__()
        self.places = nn.Linear(EMBEDDING, 2 * (len(COLORS) + len(SHAPES)))

    def forward(self, embedding: Tensor, scenes: Sequence[Scene]) -> Tensor:
        """Return the squared error: embedding (N, E), places in halves of the canvas."""
        colors, total = list(COLORS), len(COLORS) + len(SHAPES)
        places = torch.zeros(len(scenes), total, 2)
        for row, scene in enumerate(scenes):
            for item in scene.objects:
                place = torch.tensor([item.x, item.y]) / (CANVAS / 2) - 1
                places[row, colors.index(item.color)] += place
                places[row, len(colors) + SHAPES.index(item.shape)] += place
        return F.mse_loss(self.places(embedding), places.flatten(1)) * total


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


class Examples(NamedTuple):
    """A batch: pictures, first those that `truths` describe, and the scenes that the first show."""

    pictures: Tensor
    truths: list[Description]
    shown: list[Scene]


def rendered_examples(seed: int, step: int, rng: random.Random) -> Examples:
    """Render scenes and near misses and add pixel noise."""
    scenes = training_scenes(seed + 1, step, RENDERED_BATCH)
    truths = [describe(scene, rng) for scene in scenes]
    near = [spoil_scene(s, t, rng) for s, t in zip(scenes, truths, strict=True)]
    pictures = pixels([*scenes, *near])
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    noise = torch.randn(pictures.shape, generator=generator)
    return Examples(pictures + NOISE * rng.random() * noise, truths, [*scenes, *near])


def decoded_examples(data: DecodedScenes, rng: random.Random) -> Examples:
    """Draw decoded scenes, near misses, blends and renditions."""
    chosen, pictures = data.batch(rng, DECODED_BATCH)
    truths = [data.describe(index, rng) for index in chosen]
    shown = [data.scenes[i] for i in chosen] + [data.spoilt[i] for i in chosen]
    return Examples(pictures, truths, shown)


def build_reward(
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    generator: StableDiffusionPipeline,
    work: Path,
    seed: int,
    steps: tuple[int, int] = (RENDERED_STEPS, DECODED_STEPS),
) -> open_clip.CLIP:
    """Train the two towers contrastively among near misses on both sides.

    Each picture also meets captions with one thing wrong, and each caption also meets a picture
    with one thing wrong: ranking pictures for one caption is what a reward is for. First on
    renderings alone; then two batches of three show decoded pictures, and the generator's own
    renditions are among those to turn down.
    """
    torch.manual_seed(seed)
    text_cfg = model_config(tokenizer)["model_cfg"]["text_cfg"] | {"hf_tokenizer_name": None}
    model = open_clip.CLIP(**(model_config(tokenizer)["model_cfg"] | {"text_cfg": text_cfg}))
    model.load_state_dict(text_tower(text_encoder), strict=False)
    model.visual.output_tokens = True
    towers = Towers(model, tokenizer)

    def on_renderings(step: int) -> Tensor:
        rng = random.Random(f"{seed}/reward/{step}")
        return towers.loss(rendered_examples(seed, step, rng), rng)

    train(
        "reward",
        towers.modules,
        on_renderings,
        steps=steps[0],
        learning_rate=1e-3,
        state_file=work / "reward.pt",
    )
    torch.manual_seed(seed + 1)  # alike after a resume
    towers.placing = Placing()
    data = DecodedScenes(generator, seed, work)

    def on_decoded(step: int) -> Tensor:
        rng = random.Random(f"{seed}/reward2/{step}")
        decoded = step % 3 > 0
        number = steps[0] + step
        return towers.loss(
            decoded_examples(data, rng) if decoded else rendered_examples(seed, number, rng), rng
        )

    train(
        "reward2",
        towers.modules,
        on_decoded,
        steps=steps[1],
        learning_rate=1e-3,
        state_file=work / "reward2.pt",
    )
    model.visual.output_tokens = False
    model.eval()
    return model


class Towers:
    """The model in training, with its read-outs."""

    def __init__(self, model: open_clip.CLIP, tokenizer: CLIPTokenizer) -> None:
        """Add untrained read-outs to a model."""
        self.model, self.tokenizer, self.seeing = model, tokenizer, Seeing()
        self.placing: Placing | None = None

    @property
    def modules(self) -> nn.ModuleDict:
        """Everything that is trained."""
        parts: dict[str, nn.Module] = {"model": self.model, "seeing": self.seeing}
        return nn.ModuleDict(parts if self.placing is None else {**parts, "placing": self.placing})

    def loss(self, batch: Examples, rng: random.Random) -> Tensor:
        """Compute the contrastive loss among near misses, and the error of the read-outs."""
        share = LAYOUT_SHARE if self.placing is not None else 0.0
        wrong = [spoil(truth, rng, share) for truth in batch.truths for _ in range(NEGATIVES)]
        embedding, patches = self.model.visual(batch.pictures)
        tokens = tokenize(self.tokenizer, [item.text for item in (*batch.truths, *wrong)])
        text_features = self.model.encode_text(tokens, normalize=True)
        logits = F.normalize(embedding, dim=-1) @ text_features.T
        logits = self.model.logit_scale.exp().clamp(max=100) * logits
        own = torch.arange(len(batch.truths))
        to_text = F.cross_entropy(logits[: len(own)], own)
        to_image = F.cross_entropy(logits[:, : len(own)].T, own)
        known = embedding[: len(batch.shown)]
        seen = self.seeing(known, patches[: len(known)], batch.shown)
        loss: Tensor = to_text + to_image + SEEING_WEIGHT * seen
        if self.placing is not None:
            loss = loss + PLACING_WEIGHT * self.placing(known, batch.shown)
        return loss


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
