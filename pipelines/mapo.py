"""Train with MaPO (Hong et al. 2024, arXiv 2406.06424): margin-aware, without a reference."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mmalign.config import MapoConfig
from mmalign.objectives.mapo import mapo_loss
from mmalign.pipelines._offline import Draws, train_offline
from mmalign.pipelines._steps import DenoisingMeasure, all_timesteps, make_pair_step
from mmalign.pipelines._training import Run, Step


def run(config: MapoConfig) -> None:
    """Train, evaluate and write the run folder."""
    train_offline(
        config,
        method="mapo",
        families=("sd", "sdxl"),
        draws=lambda adapter: Draws(timesteps=all_timesteps(adapter)),
        make_step=lambda run: make_step(config, run),
    )


def make_step(config: MapoConfig, run: Run) -> Step:
    """Make the training step."""

    def loss(
        policy_error: Tensor, ref_error: Tensor, margins: Tensor
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        del ref_error, margins  # MaPO compares the policy with itself
        return mapo_loss(
            policy_error,
            beta=config.beta,
            score_scale=config.score_scale,
            error_scale=config.error_scale,
        )

    return make_pair_step(config, run, DenoisingMeasure(run, needs_reference=False), loss)
