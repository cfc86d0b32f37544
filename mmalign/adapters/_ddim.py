"""DDIM step by step, for methods that train on what a sampler does."""

from __future__ import annotations

import logging
from abc import abstractmethod
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from mmalign.diffusion import PredictionType, SamplerGrid, Transition, ddim_transition
from mmalign.types import Condition, InputError

logger = logging.getLogger(__name__)


class DdimSteps:
    """The sampler part of an `ImageAdapter`, whatever scheduler the checkpoint names."""

    alphas_cumprod: Tensor
    prediction_type: PredictionType
    device: torch.device

    @property
    @abstractmethod
    def _scheduler_config(self) -> Any:
        """The configuration of the checkpoint's scheduler."""

    @abstractmethod
    def predict(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        condition: Condition,
        *,
        guidance_scale: Tensor | None = None,
    ) -> Tensor:
        """Run the denoiser."""

    def sampler_grid(self, num_inference_steps: int) -> SamplerGrid:
        """Lay out DDIM steps by the checkpoint's own spacing and offset.

        Only a step whose noise has a closed-form variance can be trained on. The solvers that
        checkpoints come with (PNDM, DPM-Solver, UniPC, Euler) have none, so theirs is not taken.

        Raises:
            InputError: there are more steps than the schedule has timesteps.
        """
        total = len(self.alphas_cumprod)
        if not 1 <= num_inference_steps <= total:
            raise InputError(
                f"sampling.num_inference_steps: must be between 1 and {total},"
                f" got {num_inference_steps}"
            )
        name = str(self._scheduler_config.get("_class_name", ""))
        if not name.startswith("DDIM"):
            logger.info("training samples with DDIM; the checkpoint's %s only evaluates", name)
        # Older schedulers' configurations lack clipping, which DDIM has on by default.
        scheduler: Any = DDIMScheduler.from_config(
            self._scheduler_config, clip_sample=False, thresholding=False
        )
        scheduler.set_timesteps(num_inference_steps)
        timesteps = scheduler.timesteps.to(self.device)
        before = timesteps - total // num_inference_steps
        final = scheduler.final_alpha_cumprod.to(self.alphas_cumprod)
        alphas = torch.where(before >= 0, self.alphas_cumprod[before.clamp(min=0)], final)
        return SamplerGrid(timesteps, alphas)

    def guided_output(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        condition: Condition,
        negative: Condition,
        guidance_scale: float,
    ) -> Tensor:
        """Run `denoiser` with classifier-free guidance, which 1 or less switches off.

        Both halves go through one forward. `negative` has one row, repeated for all.
        """
        if guidance_scale <= 1:
            return self.predict(noisy_latents, timesteps, condition)
        count = len(noisy_latents)
        both = {
            name: torch.cat([negative[name].to(value).expand(count, *value.shape[1:]), value])
            for name, value in condition.items()
        }
        output = self.predict(noisy_latents.repeat(2, 1, 1, 1), timesteps.repeat(2), both)
        uncond, cond = output.chunk(2)
        return uncond + guidance_scale * (cond - uncond)

    def transition(
        self,
        model_output: Tensor,
        noisy_latents: Tensor,
        timesteps: Tensor,
        prev_alphas: Tensor,
        *,
        eta: float,
    ) -> Transition:
        """Take a DDIM step from a guided model output."""
        return ddim_transition(
            model_output,
            noisy_latents,
            timesteps,
            prev_alphas,
            alphas_cumprod=self.alphas_cumprod,
            prediction_type=self.prediction_type,
            eta=eta,
        )
