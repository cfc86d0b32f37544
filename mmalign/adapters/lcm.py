"""Latent consistency models (Luo et al. 2023, arXiv 2310.04378): the guidance scale is an input.

The denoiser takes an embedding of omega, the guidance weight in cond + omega (cond - uncond),
through `timestep_cond`. `guidance_scale` means what it means in diffusers, the scale s of
classifier-free guidance in uncond + s (cond - uncond), so omega = s - 1. Papers and their official
codes draw omega: omega in [5, 15] is a guidance scale in [6, 16] here. The embedding is that of
`LatentConsistencyModelPipeline` (omega times 1000, float32), so that training and sampling agree.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

from diffusers import DiffusionPipeline, LatentConsistencyModelPipeline, LCMScheduler
from torch import Tensor

from mmalign.adapters._source import ModelSource
from mmalign.adapters.sd import StableDiffusionAdapter
from mmalign.types import Condition, InputError


class LatentConsistencyAdapter(StableDiffusionAdapter):
    """A latent consistency model; conditions are `prompt_embeds` (B, L, D)."""

    family = "lcm"
    pipeline_class: ClassVar[type[DiffusionPipeline]] = LatentConsistencyModelPipeline

    @classmethod
    def _check(cls, source: ModelSource, pipeline: Any) -> None:
        super()._check(source, pipeline)
        if not isinstance(pipeline.scheduler, LCMScheduler):
            name = type(pipeline.scheduler).__name__
            raise InputError(f"{source.name}: a consistency model needs LCMScheduler, not {name}")

    def _extra_inputs(self, inputs: Condition, guidance_scale: Tensor | None) -> dict[str, Any]:
        if guidance_scale is None:
            raise InputError(
                f"{self.source.name}: a consistency model cannot be trained without guidance"
                " scales; use consistency-dpo"
            )
        pipeline = cast(Any, self._pipeline)
        # On the CPU, as upstream: an angle of thousands of radians turns the last bit of a
        # frequency into the third digit of its sine.
        embedding = pipeline.get_guidance_scale_embedding(
            guidance_scale.float().cpu() - 1, embedding_dim=pipeline.unet.config.time_cond_proj_dim
        )
        return {"timestep_cond": embedding.to(inputs["prompt_embeds"])}
