"""Train with Diffusion-KTO (Li et al. 2024, arXiv 2404.04465): images labelled good or bad."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmalign import processes
from mmalign.config import DiffusionKtoConfig
from mmalign.objectives.diffusion_kto import diffusion_kto_loss
from mmalign.pipelines._offline import Draws, train_offline
from mmalign.pipelines._steps import DenoisingMeasure, all_timesteps, make_pair_step
from mmalign.pipelines._training import Run, Step
from mmalign.types import InputError


def run(config: DiffusionKtoConfig) -> None:
    """Train, evaluate and write the run folder.

    Raises:
        InputError: `split_pair_backward` is on; the baseline couples all samples of a batch.
    """
    if config.split_pair_backward:
        raise InputError(
            "split_pair_backward: Diffusion-KTO couples the samples of a batch; leave it off"
        )
    train_offline(
        config,
        method="diffusion-kto",
        families=("sd", "sdxl"),
        draws=lambda adapter: Draws(timesteps=all_timesteps(adapter)),
        make_step=lambda run: make_step(config, run),
        coupled=config.kl_estimate != "none",
    )


def make_step(config: DiffusionKtoConfig, run: Run) -> Step:
    """Make the training step."""

    def loss(
        policy_error: Tensor, ref_error: Tensor, margins: Tensor
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        del margins  # labels only
        desirable = (
            torch.arange(len(policy_error), device=policy_error.device) < len(policy_error) // 2
        )
        return diffusion_kto_loss(
            policy_error,
            ref_error,
            desirable,
            beta=config.beta,
            kl_estimate=config.kl_estimate,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
            over_processes=processes.mean,
        )

    return make_pair_step(config, run, DenoisingMeasure(run, cache=config.num_draws > 0), loss)
