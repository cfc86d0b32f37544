"""Stable Diffusion 1.x and 2.x: one text encoder, epsilon or v prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from mmalign.adapters._diffusers import DiffusersAdapter
from mmalign.types import Condition


class StableDiffusionAdapter(DiffusersAdapter):
    """Stable Diffusion; conditions are `prompt_embeds` (B, L, D)."""

    family = "sd"
    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusionPipeline
    without_safety_checker: ClassVar[dict[str, Any]] = {
        "safety_checker": None,
        "requires_safety_checker": False,
    }

    @torch.no_grad()
    def encode_condition(self, prompts: Sequence[str], *, height: int, width: int) -> Condition:
        """Encode prompts to `prompt_embeds` (B, L, D); the size has no influence."""
        pipeline: Any = cast(Any, self.pipeline)
        embeds, _ = pipeline.encode_prompt(list(prompts), self.device, 1, False)
        return {"prompt_embeds": embeds}
