"""Stable Diffusion XL: two text encoders, pooled embeddings and size conditioning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor

from mmalign.adapters._diffusers import DiffusersAdapter
from mmalign.adapters._source import ModelSource
from mmalign.types import Condition, InputError


class StableDiffusionXLAdapter(DiffusersAdapter):
    """SDXL.

    Conditions are `prompt_embeds` (B, L, D), `pooled_prompt_embeds` (B, P) and `time_ids` (B, 6).
    """

    family = "sdxl"
    pipeline_class: ClassVar[type[DiffusionPipeline]] = StableDiffusionXLPipeline
    encoders: ClassVar[tuple[str, ...]] = ("vae", "text_encoder", "text_encoder_2")

    @classmethod
    def _check(cls, source: ModelSource, pipeline: Any) -> None:
        super()._check(source, pipeline)
        if pipeline.vae.config.latents_mean is not None:
            raise InputError(f"{source.name}: per-channel latent statistics are not supported")

    @torch.no_grad()
    def encode_condition(self, prompts: Sequence[str], *, height: int, width: int) -> Condition:
        """Encode prompts for images of height x width that were not cropped.

        Time ids are (original height, original width, crop top, crop left, target height, target
        width) with original = target and no crop, float32. The empty prompt becomes what
        classifier-free guidance subtracts when sampling: zeros for checkpoints with
        `force_zeros_for_empty_prompt` (SDXL base), its encoding for others. (The official
        Diffusion-DPO code trains dropped captions on the encoding, which SDXL base never samples.)
        """
        pipeline: Any = cast(Any, self.pipeline)
        embeds, _, pooled, _ = pipeline.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False
        )
        if pipeline.config.force_zeros_for_empty_prompt:
            written = torch.tensor([prompt != "" for prompt in prompts], device=self.device)
            embeds, pooled = embeds * written[:, None, None], pooled * written[:, None]
        size = torch.tensor([height, width, 0, 0, height, width], device=self.device)
        return {
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": pooled,
            "time_ids": size.float().repeat(len(prompts), 1),
        }

    def _extra_inputs(self, inputs: Condition, guidance_scale: Tensor | None) -> dict[str, Any]:
        added = {"text_embeds": inputs["pooled_prompt_embeds"], "time_ids": inputs["time_ids"]}
        return {**super()._extra_inputs(inputs, guidance_scale), "added_cond_kwargs": added}
