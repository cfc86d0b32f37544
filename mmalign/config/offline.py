"""Options of the methods that train on pairs made before."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mmalign.config.parts import CurriculumConfig, PairsConfig, PreferenceConfig, RunConfig


@dataclass(kw_only=True)
class OfflineConfig(RunConfig, PreferenceConfig):
    """Training from pairs that exist before training starts.

    Attributes:
        pairs: where pairs come from.
        curriculum: order pairs from easy to hard; random order when omitted.
        caption_dropout: share of pairs trained with the empty prompt, the same for both sides.
        num_draws: with K > 0 each pair has K fixed (timestep, noise) draws, so that reference
            errors are computed once and cached; 0 draws afresh at every step.
        split_pair_backward: back-propagate chosen and rejected one after the other: exact, less
            memory.
    """

    pairs: PairsConfig = field(default_factory=PairsConfig)
    curriculum: CurriculumConfig | None = None
    caption_dropout: float = 0.0
    num_draws: int = 0
    split_pair_backward: bool = False


@dataclass(kw_only=True)
class DiffusionDpoConfig(OfflineConfig):
    """Diffusion-DPO.

    Attributes:
        beta: strength of the pull to the reference, in units of one over a mean squared error.
        beta_convention: `salesforce` multiplies the error difference by beta / 2, `diffusers` by
            beta.
        min_timestep: smallest scheduler timestep trained at. Raise it where pairs differ in what is
            in the picture rather than in how it is finished.
        max_timestep: largest one; the schedule's last when omitted.
    """

    beta: float = 5000.0
    beta_convention: Literal["salesforce", "diffusers"] = "salesforce"
    min_timestep: int = 0
    max_timestep: int | None = None


@dataclass(kw_only=True)
class CurriculumDpoConfig(DiffusionDpoConfig):
    """Diffusion-DPO with a curriculum.

    Attributes:
        curriculum: order of the pairs, from easy to hard.
    """

    curriculum: CurriculumConfig | None = field(default_factory=CurriculumConfig)


@dataclass(kw_only=True)
class ConsistencyDpoConfig(OfflineConfig):
    """Consistency DPO on a latent consistency model.

    Attributes:
        beta: strength of the pull to the reference, in units of one over a pseudo-Huber distance.
        teacher: diffusion checkpoint whose solver gives the target, same forms as `model`.
        huber_c: constant c of the pseudo-Huber distance.
        min_guidance: smallest guidance scale drawn, in units of classifier-free guidance: the
            papers' omega plus 1.
        max_guidance: largest guidance scale drawn.
        num_ddim_timesteps: steps of the teacher's DDIM grid.
    """

    beta: float = 200.0
    teacher: str = "pkg://mmalign.shapes/models/sd"
    huber_c: float = 1e-3
    min_guidance: float = 6.0
    max_guidance: float = 16.0
    num_ddim_timesteps: int = 50


@dataclass(kw_only=True)
class MapoConfig(OfflineConfig):
    """MaPO: margin-aware preference optimization without a reference.

    Attributes:
        beta: weight of the margin term against the chosen side's denoising error.
        score_scale: the paper's T in logsigmoid(T * log-odds).
        error_scale: the code's s, multiplies denoising errors inside the odds.
    """

    beta: float = 0.1
    score_scale: float = 1000.0
    error_scale: float = 0.5


@dataclass(kw_only=True)
class DiffusionKtoConfig(OfflineConfig):
    """Diffusion-KTO: every image is a single sample labelled good or bad.

    Attributes:
        beta: strength of the pull to the reference, in units of one over a mean squared error.
        kl_estimate: baseline: clamped batch mean, class-balanced mean, or none.
        desirable_weight: weight of good samples.
        undesirable_weight: weight of bad samples.
    """

    beta: float = 1000.0
    kl_estimate: Literal["batch_mean", "balanced_mean", "none"] = "batch_mean"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclass(kw_only=True)
class DroConfig(OfflineConfig):
    """DRO: chosen images are fitted, rejected ones un-fitted.

    Attributes:
        loser_cap: a rejected image is pushed away until its error exceeds the reference's by this
            share; without a cap the loss has no lower bound, as in the authors' code.
        anchor_weight: weight of the squared distance to the reference's error.
    """

    loser_cap: float | None = 0.1
    anchor_weight: float = 0.0
