"""Batches of rendered scenes, each a pure function of (seed, step)."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

from mmalign.shapes.render import render
from mmalign.shapes.scene import Scene, sample_scene


def training_scenes(seed: int, step: int, count: int) -> list[Scene]:
    """Draw `count` scenes of training compositions for one step."""
    rng = random.Random(f"{seed}/{step}")
    return [sample_scene(rng) for _ in range(count)]


def pixels(scenes: list[Scene]) -> Tensor:
    """Render scenes as a float tensor (N, 3, 64, 64) in [-1, 1]."""
    array = np.stack([np.asarray(render(scene)) for scene in scenes])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1
