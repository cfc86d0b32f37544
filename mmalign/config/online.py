"""Options of the methods that sample while they train."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mmalign.config.offline import CurriculumDpoConfig
from mmalign.config.parts import (
    CandidatesConfig,
    Combination,
    PreferenceConfig,
    RewardConfig,
    RunConfig,
)


@dataclass(kw_only=True)
class OnlineConfig(RunConfig):
    """Training on images sampled by the policy itself.

    `per_device_train_batch_size` counts prompts per forward; `sampling` holds for training and for
    evaluation.

    Attributes:
        prompts: file with one prompt per line (or .jsonl with `prompt`).
        num_prompts: use only the first so many prompts.
        rewards: rewards to train on; those that are `eval_only` are logged beside them.
        combine: how several become one: `sum` of weighted scores, each by its own `normalize`, or
            `zscore`, `rank` or `gdpo` among the samples of a prompt.
        eta: stochasticity of DDIM while training, 0 to 1; evaluation takes `sampling.eta`.
    """

    prompts: str = ""
    num_prompts: int | None = None
    rewards: list[RewardConfig] = field(default_factory=lambda: [RewardConfig()])
    combine: Combination = "sum"
    eta: float = 1.0


@dataclass(kw_only=True)
class TrajectoryConfig(OnlineConfig, PreferenceConfig):
    """Preferences between sampler steps.

    Attributes:
        beta: strength of the pull to the reference, in units of one over a log-ratio.
        reduction: log-densities are averaged over the elements of the latents (the official codes,
            and what `beta` defaults to) or summed.
        clamp: which side of the interval around 1 the ratio of policy and reference is clamped to:
            `both` (the official codes), `one_sided` (a sample that fell behind can come back), or
            `none`.
        clip_range: half the width of that interval.
        train_steps: sampler steps trained per trajectory, drawn anew each time; all when omitted.
    """

    beta: float = 0.1
    reduction: Literal["mean", "sum"] = "mean"
    clamp: Literal["both", "one_sided", "none"] = "both"
    clip_range: float = 0.1
    train_steps: int | None = None


@dataclass(kw_only=True)
class D3poConfig(TrajectoryConfig):
    """D3PO: whole trajectories from one starting noise, compared by their images.

    Attributes:
        candidates: trajectories per prompt; the best is paired with the worst.
        preference: `sum` compares the weighted sum of the rewards; `pareto` wants a pair in which
            no reward is lower and one is higher (the official code), else the prompt is a tie.
    """

    candidates: int = 2
    preference: Literal["sum", "pareto"] = "sum"


@dataclass(kw_only=True)
class TailorpoConfig(TrajectoryConfig):
    """TailorPO: two candidates of one step, compared by the reward of the images they predict.

    Attributes:
        continuation: which candidate sampling goes on from.
        guidance_step_size: with a differentiable reward, move the preferred candidate up its
            gradient by so much (root mean square, in units of latents): TailorPO-G; 0 is off.
        first_trained_step: sampler steps before this one are never trained.
    """

    beta: float = 10.0
    clamp: Literal["both", "one_sided", "none"] = "one_sided"
    train_steps: int | None = 5
    continuation: Literal["preferred", "random"] = "random"
    guidance_step_size: float = 0.0
    first_trained_step: int = 0


@dataclass(kw_only=True)
class DraftConfig(OnlineConfig):
    """DRaFT: the gradient of a differentiable reward, through the sampler.

    Attributes:
        backprop_steps: K, the last sampler steps with gradients; all of them is plain DRaFT.
        num_lv_samples: n of DRaFT-LV, further images from noising the last step again; needs K 1.
        kl_weight: weight of the squared difference between outputs of policy and reference, in
            units of reward (DRaFT+).
        decode_batch_size: images decoded at a time; the decoder owns most of the memory.
    """

    backprop_steps: int = 1
    num_lv_samples: int = 0
    kl_weight: float = 0.0
    decode_batch_size: int = 1


@dataclass(kw_only=True)
class RocmConfig(OnlineConfig):
    """ROCM: a differentiable reward through a consistency model's sampler, with a divergence.

    Attributes:
        divergence: from the reference, summed over steps.
        divergence_weight: its weight, in units of reward.
        reduction: over the elements of the latents.
        decode_batch_size: images decoded at a time.
    """

    divergence: Literal["kl", "hellinger", "fisher", "js"] = "kl"
    divergence_weight: float = 0.1
    reduction: Literal["mean", "sum"] = "mean"
    decode_batch_size: int = 1


@dataclass(kw_only=True)
class OnlineDpoConfig(CurriculumDpoConfig):
    """Diffusion-DPO in rounds, each on pairs that the policy of the round before makes.

    `pairs` says how images are prepared; its path is the round's own. `max_steps` counts the steps
    of one round. With `curriculum: null` pairs come in random order.

    Attributes:
        rounds: how often pairs are made anew.
        candidates: how each round's pairs are made.
    """

    rounds: int = 3
    candidates: CandidatesConfig = field(default_factory=CandidatesConfig)
