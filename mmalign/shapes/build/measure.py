"""Measured quality of the built models: the numbers on the model card."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from mmalign.randomness import keyed_generator
from mmalign.shapes.build.near_miss import spoil, spoil_scene
from mmalign.shapes.build.scenes import pixels
from mmalign.shapes.captions import describe
from mmalign.shapes.judge import ShapesJudge
from mmalign.shapes.parser import parse_image
from mmalign.shapes.render import render
from mmalign.shapes.scene import Scene, sample_scene

BATCH = 32


def parser_accuracy(seed: int, scenes: int = 5000) -> dict[str, float]:
    """Share of rendered objects the parser reads with the right shape, color and size."""
    rng = random.Random(f"{seed}/parser")
    objects = found = valid = 0
    for _ in tqdm(range(scenes), desc="parse rendered scenes"):
        scene = sample_scene(rng, held_out=None)
        parsed = parse_image(render(scene))
        objects += len(scene.objects)
        found += (_attributes(scene) & _attributes(parsed.scene)).total()
        valid += parsed.valid
    return {"per_object": found / objects, "valid": valid / scenes, "objects": objects}


def _attributes(scene: Scene) -> Counter[tuple[str, str, str]]:
    return Counter((item.shape, item.color, item.size) for item in scene.objects)


def prompt_following(
    pipeline: DiffusionPipeline, prompts: Sequence[str], *, seed: int, **sampling: Any
) -> dict[str, float]:
    """Share of prompts whose picture is correct, of readable pictures, and of true claims."""
    pictures = sample(pipeline, prompts, seed=seed, **sampling)
    judge = ShapesJudge()
    metrics = judge.metrics(pictures, prompts)
    return {
        "correct": metrics["correct"].mean().item(),
        "valid": metrics["valid"].mean().item(),
        "claims": judge(pictures, prompts).mean().item(),
    }


def sample(
    pipeline: DiffusionPipeline, prompts: Sequence[str], *, seed: int, **sampling: Any
) -> Tensor:
    """Sample one picture per prompt, each from its own generator; (N, 3, 64, 64) in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    parts = []
    for start in tqdm(range(0, len(prompts), BATCH), desc="sample"):
        batch = list(prompts[start : start + BATCH])
        generators = [keyed_generator(seed, prompt, start + i) for i, prompt in enumerate(batch)]
        parts.append(pipeline(batch, generator=generators, output_type="pt", **sampling).images)
    return torch.cat(parts).float()


@torch.no_grad()
def reward_accuracy(folder: Path, seed: int, scenes: int = 500) -> dict[str, float]:
    """How often the reward model picks the right caption of held-out scenes.

    `retrieval` is top-1 among all captions of the set; `near_miss` compares the true caption with
    one that has a single claim changed, `near_miss_picture` the true picture with one that has a
    single thing changed, and `layout` the true caption with one that turns its relation or place
    around.
    """
    model = open_clip.create_model_and_transforms(f"local-dir:{folder}")[0]
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    rng = random.Random(f"{seed}/retrieval")
    pictures = [sample_scene(rng, held_out=True) for _ in range(scenes)]
    truths = [describe(scene, rng) for scene in pictures]
    spoilt = [spoil_scene(s, t, rng) for s, t in zip(pictures, truths, strict=True)]
    images = model.eval().encode_image(pixels(pictures), normalize=True)
    texts = model.encode_text(tokenizer([t.text for t in truths]), normalize=True)
    wrong = model.encode_text(tokenizer([spoil(t, rng).text for t in truths]), normalize=True)
    wrong_images = model.encode_image(pixels(spoilt), normalize=True)
    similarity = images @ texts.T
    own = similarity.diagonal()
    told = [index for index, truth in enumerate(truths) if truth.relation or truth.place]
    turned = [spoil(truths[index], rng, layout_share=1.0).text for index in told]
    around = model.encode_text(tokenizer(turned), normalize=True)
    return {
        "retrieval": (own >= similarity.max(1).values).float().mean().item(),
        "near_miss": (own > (images * wrong).sum(1)).float().mean().item(),
        "near_miss_picture": (own > (wrong_images * texts).sum(1)).float().mean().item(),
        "layout": (own[told] > (images[told] * around).sum(1)).float().mean().item(),
        "scenes": scenes,
    }
