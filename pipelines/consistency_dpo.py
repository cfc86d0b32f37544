"""Train with Consistency DPO, Curriculum DPO's loss for consistency models (arXiv 2405.13637)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from mmalign.adapters import load_adapter
from mmalign.config import ConsistencyDpoConfig
from mmalign.data.batch import PairBatch
from mmalign.diffusion import consistency_function, ddim_grid
from mmalign.objectives.consistency_dpo import (
    consistency_dpo_loss,
    pseudo_huber_distance,
    teacher_step,
)
from mmalign.pipelines._offline import Draws, train_offline
from mmalign.pipelines._steps import Measured, make_pair_step
from mmalign.pipelines._training import Run, Step
from mmalign.types import ImageAdapter, InputError


def run(config: ConsistencyDpoConfig, started: float | None = None) -> None:
    """Train, evaluate and write the run folder; `started` is when the whole job began.

    Raises:
        InputError: `num_draws` is set; the reference also makes the target, which is not cached.
    """
    if config.num_draws:
        raise InputError("num_draws: Consistency DPO has no cached reference; leave it at 0")
    train_offline(
        config,
        method="consistency-dpo",
        families=("lcm",),
        draws=lambda adapter: Draws(
            timesteps=ddim_grid(
                adapter.alphas_cumprod, config.num_ddim_timesteps
            ).timesteps.tolist(),
            guidance_range=(config.min_guidance, config.max_guidance),
        ),
        make_step=lambda run: make_step(config, run),
        started=started,
    )


def make_step(config: ConsistencyDpoConfig, run: Run) -> Step:
    """Make the training step, loading the teacher."""
    settings = replace(config, model=config.teacher, family="auto", adapter=None)
    teacher = load_adapter(settings, device=run.accelerator.device, for_training=False)
    teacher.release_encoders()
    run.meter.watch(teacher.denoiser)

    def loss(
        policy_distance: Tensor, ref_distance: Tensor, margins: Tensor
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return consistency_dpo_loss(
            policy_distance,
            ref_distance,
            beta=config.beta,
            preference=config,
            score_margins=margins,
        )

    return make_pair_step(config, run, ConsistencyMeasure(config, run, teacher), loss)


class ConsistencyMeasure:
    """Pseudo-Huber distance to the frozen reference one teacher step further."""

    def __init__(self, config: ConsistencyDpoConfig, run: Run, teacher: ImageAdapter) -> None:
        """Measure with `run`'s adapter and reference against `teacher`'s solver."""
        self._config, self._run, self._teacher = config, run, teacher
        alphas = run.adapter.alphas_cumprod.to(run.accelerator.device)
        self._grid = ddim_grid(alphas, config.num_ddim_timesteps)

    @torch.no_grad()
    def reference(self, batch: PairBatch) -> Measured:
        """Run the teacher once and the reference twice."""
        noisy = self._noisy(batch)
        with self._run.accelerator.autocast():
            cond, uncond = (
                self._teacher.predict(noisy, batch.timesteps, condition).float()
                for condition in (batch.condition, batch.empty_condition)
            )
        end = teacher_step(
            cond,
            uncond,
            noisy,
            batch.timesteps,
            batch.guidance_scale,
            alphas_cumprod=self._teacher.alphas_cumprod.to(noisy.device),
            prediction_type=self._teacher.prediction_type,
            grid=self._grid,
        )
        with self._run.reference.active():
            target = self._clean(batch, end.next_latents, end.next_timesteps)
            own = self._clean(batch, noisy, batch.timesteps)
        return Measured(self._distance(own, target), target)

    def policy(self, batch: PairBatch, target: Tensor) -> Tensor:
        """Run the policy."""
        return self._distance(self._clean(batch, self._noisy(batch), batch.timesteps), target)

    def _noisy(self, batch: PairBatch) -> Tensor:
        return self._run.adapter.add_noise(batch.latents, batch.noise, batch.timesteps)

    def _clean(self, batch: PairBatch, noisy: Tensor, timesteps: Tensor) -> Tensor:
        adapter = self._run.adapter
        with self._run.accelerator.autocast():
            output = adapter.predict(
                noisy, timesteps, batch.condition, guidance_scale=batch.guidance_scale
            ).float()
        return consistency_function(
            output,
            noisy,
            timesteps,
            alphas_cumprod=adapter.alphas_cumprod.to(noisy.device),
            prediction_type=adapter.prediction_type,
        )

    def _distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        return pseudo_huber_distance(prediction, target, huber_c=self._config.huber_c)
