"""Train with DRO of DSO (arXiv 2503.22677): fit images labelled good, un-fit bad ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmalign.config import DroConfig
from mmalign.objectives.dro import dro_loss
from mmalign.pipelines._offline import Draws, train_offline
from mmalign.pipelines._steps import DenoisingMeasure, all_timesteps, make_pair_step
from mmalign.pipelines._training import Run, Step
from mmalign.types import InputError


def run(config: DroConfig) -> None:
    """Train, evaluate and write the run folder.

    Raises:
        InputError: `split_pair_backward` is on; both labels are averaged together.
    """
    if config.split_pair_backward:
        raise InputError("split_pair_backward: DRO has samples, not pairs; leave it off")
    train_offline(
        config,
        method="dro",
        families=("sd", "sdxl"),
        draws=lambda adapter: Draws(timesteps=all_timesteps(adapter)),
        make_step=lambda run: make_step(config, run),
    )


def make_step(config: DroConfig, run: Run) -> Step:
    """Make the training step."""
    bounded = config.loser_cap is not None or config.anchor_weight > 0

    def loss(
        policy_error: Tensor, ref_error: Tensor, margins: Tensor
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        del margins  # labels only
        half = len(policy_error) // 2
        return dro_loss(
            policy_error,
            torch.arange(len(policy_error), device=policy_error.device) < half,
            ref_error=ref_error if bounded else None,
            loser_cap=config.loser_cap,
            anchor_weight=config.anchor_weight,
        )

    measure = DenoisingMeasure(run, cache=config.num_draws > 0, needs_reference=bounded)
    return make_pair_step(config, run, measure, loss)
