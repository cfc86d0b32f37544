"""Latent consistency models (Luo et al. 2023, arXiv 2310.04378): the guidance scale is an input.

The denoiser takes an embedding of omega, the guidance weight in cond + omega (cond - uncond),
through `timestep_cond`. `guidance_scale` means what it means in diffusers, the scale s of
classifier-free guidance in uncond + s (cond - uncond), so omega = s - 1. Papers and their official
codes draw omega: omega in [5, 15] is a guidance scale in [6, 16] here. The embedding is that of
`LatentConsistencyModelPipeline` (omega times 1000, float32), so that training and sampling agree.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from diffusers import DiffusionPipeline, LatentConsistencyModelPipeline, LCMScheduler
from torch import Tensor

from mmalign.adapters._folder import first_line
from mmalign.adapters._source import ModelSource
from mmalign.adapters.sd import StableDiffusionAdapter
from mmalign.diffusion import SamplerGrid, Transition, consistency_transition
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

    def sampler_grid(self, num_inference_steps: int) -> SamplerGrid:
        """Lay out the steps of multistep consistency sampling; the last one ends without noise.

        Raises:
            InputError: the scheduler has no such grid.
        """
        if num_inference_steps < 1:
            raise InputError(
                f"sampling.num_inference_steps: must be at least 1, got {num_inference_steps}"
            )
        scheduler: Any = LCMScheduler.from_config(self._scheduler_config)
        try:
            scheduler.set_timesteps(num_inference_steps)
        except ValueError as error:
            raise InputError(f"sampling.num_inference_steps: {first_line(error)}") from error
        timesteps = scheduler.timesteps.to(self.device)
        alphas = self.alphas_cumprod[timesteps[1:]]
        return SamplerGrid(timesteps, torch.cat([alphas, alphas.new_ones(1)]))

    def guided_output(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        condition: Condition,
        negative: Condition,
        guidance_scale: float,
    ) -> Tensor:
        """Run `denoiser` with the guidance scale embedded; `negative` has no influence."""
        scales = torch.full((len(noisy_latents),), guidance_scale, device=noisy_latents.device)
        return self.predict(noisy_latents, timesteps, condition, guidance_scale=scales)

    def transition(
        self,
        model_output: Tensor,
        noisy_latents: Tensor,
        timesteps: Tensor,
        prev_alphas: Tensor,
        *,
        eta: float,
    ) -> Transition:
        """Take a multistep consistency step; `eta` has no influence."""
        return consistency_transition(
            model_output,
            noisy_latents,
            timesteps,
            prev_alphas,
            alphas_cumprod=self.alphas_cumprod,
            prediction_type=self.prediction_type,
            timestep_scaling=self._scheduler_config.timestep_scaling,
        )

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
