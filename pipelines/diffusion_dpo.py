"""Train with Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mmalign.config import DiffusionDpoConfig
from mmalign.objectives.diffusion_dpo import diffusion_dpo_loss
from mmalign.pipelines._offline import Draws, train_offline
from mmalign.pipelines._steps import DenoisingMeasure, make_pair_step, timesteps_between
from mmalign.pipelines._training import Run, Step


def run(
    config: DiffusionDpoConfig, method: str = "diffusion-dpo", started: float | None = None
) -> None:
    """Train, evaluate and write the run folder; `started` is when the whole job began."""
    train_offline(
        config,
        method=method,
        families=("sd", "sdxl"),
        draws=lambda adapter: Draws(
            timesteps=timesteps_between(adapter, config.min_timestep, config.max_timestep)
        ),
        make_step=lambda run: make_step(config, run),
        started=started,
    )


def make_step(config: DiffusionDpoConfig, run: Run) -> Step:
    """Make the training step."""

    def loss(
        policy_error: Tensor, ref_error: Tensor, margins: Tensor
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return diffusion_dpo_loss(
            policy_error,
            ref_error,
            beta=config.beta,
            beta_convention=config.beta_convention,
            preference=config,
            score_margins=margins,
        )

    measure = DenoisingMeasure(run, cache=config.num_draws > 0)
    return make_pair_step(config, run, measure, loss)
