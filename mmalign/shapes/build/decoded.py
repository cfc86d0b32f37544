"""Pictures as the generator makes them, for the reward to learn on besides clean renderings.

A reward that has only seen renderings does not tell a melted or half-faded shape from a whole one.
So scenes pass through the autoencoder, as all samples do. Beside each stand a blend of its latents
with those of a near miss, which melts or fades what differs, and what the generator made of its
caption in few steps: at best as good as the scene itself.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from mmalign.shapes.build.autoencoder import encode_scenes
from mmalign.shapes.build.near_miss import spoil_scene
from mmalign.shapes.build.scenes import training_scenes
from mmalign.shapes.captions import Description, describe
from mmalign.shapes.scene import Scene

COUNT = 6000
BATCH = 48
STEPS = 6
GUIDANCE = 2.5
KINDS = ("scenes", "spoilt", "blends", "renditions")
BLEND = (0.3, 0.7)  # share of the near miss


class DecodedScenes:
    """Training scenes, near misses, blends of both and the generator's renditions, decoded once.

    `truths[i]` describes `scenes[i]` and not `spoilt[i]`.
    """

    def __init__(self, generator: StableDiffusionPipeline, seed: int, work: Path) -> None:
        """Decode `COUNT` pictures of each kind, or read them back from `work`."""
        rng = random.Random(f"{seed}/decoded")
        self.scenes: list[Scene] = training_scenes(seed + 4, -1, COUNT)
        self.truths: list[Description] = [describe(scene, rng) for scene in self.scenes]
        self.spoilt: list[Scene] = [
            spoil_scene(s, t, rng) for s, t in zip(self.scenes, self.truths, strict=True)
        ]
        file = work / "decoded.pt"
        if not file.exists():
            torch.save(self._decode(generator, seed), file)
        self._pictures: dict[str, Tensor] = torch.load(file, weights_only=True)

    def _decode(self, generator: StableDiffusionPipeline, seed: int) -> dict[str, Tensor]:
        scenes, spoilt = (
            encode_scenes(generator.vae, kind, BATCH) for kind in (self.scenes, self.spoilt)
        )
        draws = torch.rand(len(scenes), 1, 1, 1, generator=torch.Generator().manual_seed(seed))
        blends = scenes.lerp(spoilt, BLEND[0] + (BLEND[1] - BLEND[0]) * draws)
        latents = {"scenes": scenes, "spoilt": spoilt, "blends": blends}
        pictures = {kind: _decode(generator.vae, given) for kind, given in latents.items()}
        captions = [truth.text for truth in self.truths]
        return {**pictures, "renditions": _sample(generator, captions, seed)}

    def batch(self, rng: random.Random, size: int) -> tuple[list[int], Tensor]:
        """Draw `size` indices and their pictures in [-1, 1], `KINDS` one after the other."""
        chosen = rng.sample(range(len(self.scenes)), size)
        pictures = torch.cat([self._pictures[kind][chosen] for kind in KINDS])
        return chosen, pictures.float() / 127.5 - 1

    def describe(self, index: int, rng: random.Random) -> Description:
        """Draw a description that the scene fits and its near miss does not."""
        drawn = describe(self.scenes[index], rng)
        return self.truths[index] if all(drawn.claims(self.spoilt[index]).values()) else drawn


def _bytes(pictures: Tensor) -> Tensor:
    """Turn pictures in [-1, 1] into bytes."""
    return ((pictures + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def _decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    batches = range(0, len(latents), BATCH)
    return torch.cat(
        [
            _bytes(vae.decode(latents[start : start + BATCH]).sample)
            for start in tqdm(batches, desc="decode latents")
        ]
    )


def _sample(pipeline: StableDiffusionPipeline, captions: list[str], seed: int) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in tqdm(range(0, len(captions), BATCH), desc="sample renditions"):
        pictures = pipeline(
            captions[start : start + BATCH],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=generator,
            output_type="pt",
        ).images
        parts.append(_bytes(pictures.float() * 2 - 1))
    return torch.cat(parts)
