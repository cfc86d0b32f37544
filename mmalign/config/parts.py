"""The options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

OnBadRow = Literal["stop", "skip"]
PairRule = Literal["best_worst", "all_pairs", "top_k", "pareto"]
Combination = Literal["sum", "zscore", "rank", "gdpo"]
Family = Literal["auto", "sd", "sdxl", "lcm"]
LossType = Literal[
    "sigmoid",
    "ipo",
    "hinge",
    "robust",
    "offset",
    "reverse_kl",
    "forward_kl",
    "js",
    "alpha",
    "cdpo",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
    "simpo",
]
ATTENTION_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


EVALUATION_SEED = 1_000_000
"""Jobs that train from seed s key evaluation images by this plus s: none is also a candidate."""


@dataclass(kw_only=True)
class ModelConfig:
    """A diffusion checkpoint and how to hold it.

    Attributes:
        model: local folder in diffusers' format, hub id, or `pkg://package/folder` for a folder
            shipped inside an installed package.
        family: model family; `auto` reads it from the checkpoint.
        revision: hub revision.
        variant: weight file variant such as `fp16`.
        adapter: folder or file of a LoRA to load on top.
        adapter_scale: multiplier of that LoRA.
        device: torch device; `auto` takes the accelerator when there is one.
        dtype: dtype of weights that are not trained.
        offline: never contact a hub.
    """

    model: str = "pkg://mmalign.shapes/models/sd"
    family: Family = "auto"
    revision: str | None = None
    variant: str | None = None
    adapter: str | None = None
    adapter_scale: float = 1.0
    device: str = "auto"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    offline: bool = False


@dataclass(kw_only=True)
class LoraConfig:
    """What is trained: a low-rank adapter, or with `enabled: false` every weight of the denoiser.

    Attributes:
        enabled: train a LoRA; otherwise full fine-tuning with a frozen copy as reference.
        rank: rank r of the update.
        alpha: scaling numerator, the update is multiplied by alpha / rank; `rank` when omitted.
        targets: module name suffixes, as peft's `target_modules`.
        init_from: folder or file of a LoRA of this rank, alpha and targets to go on from; the
            reference stays the model without it.
    """

    enabled: bool = True
    rank: int = 8
    alpha: float | None = None
    targets: list[str] = field(default_factory=lambda: list(ATTENTION_TARGETS))
    init_from: str | None = None


@dataclass(kw_only=True)
class PairsConfig:
    """Where preference pairs come from and how their images are prepared.

    Attributes:
        path: folder, parquet file, webdataset shard(s) or `metadata.jsonl`.
        format: layout of `path`; `auto` recognises it.
        resolution: images are resized so that the short side fits, then centre-cropped, in pixels.
        random_flip: cache the mirrored view as well and draw one of the two per step.
        on_bad_row: `stop` at the first bad row, or `skip`, count and list them.
        max_pixels: images with more pixels are refused before they are decoded.
        cache_latents: encode images and prompts once into `cache_dir`; otherwise every step does.
        cache_dir: folder of that cache; `<output_dir>/cache` when omitted.
        limit: use only the first `limit` pairs.
    """

    path: str = ""
    format: Literal[
        "auto", "parquet", "webdataset", "imagefolder", "pickapic", "hpdv2", "win_lose"
    ] = "auto"
    resolution: int = 512
    random_flip: bool = False
    on_bad_row: OnBadRow = "stop"
    max_pixels: int = 50_000_000
    cache_latents: bool = True
    cache_dir: str | None = None
    limit: int | None = None


@dataclass(kw_only=True)
class RewardConfig:
    """One reward in a list of rewards.

    Attributes:
        name: a built-in name, an entry point of group `mmalign.rewards`, or a dotted path
            `module:callable`.
        weight: multiplier in the weighted sum.
        normalize: what is done to the raw scores first: nothing, z-score over the scored set,
            z-score per prompt, or rank per prompt scaled to [0, 1].
        eval_only: log and report this reward, but never train on it nor choose pairs by it.
        batch_size: images scored at a time.
        options: keyword arguments of the reward's class.
    """

    name: str = "clip"
    weight: float = 1.0
    normalize: Literal["none", "zscore", "prompt_zscore", "prompt_rank"] = "none"
    eval_only: bool = False
    batch_size: int = 32
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class SamplingConfig:
    """How images are sampled.

    Attributes:
        num_inference_steps: sampler steps.
        guidance_scale: classifier-free guidance; 1 switches it off.
        eta: stochasticity of DDIM, 0 to 1.
        height: image height in pixels; the model's own when omitted.
        width: image width in pixels; the model's own when omitted.
        batch_size: images per forward.
        seed: base seed; each image's generator is keyed by (seed, prompt, index).
    """

    num_inference_steps: int = 20
    guidance_scale: float = 5.0
    eta: float = 0.0
    height: int | None = None
    width: int | None = None
    batch_size: int = 8
    seed: int = 0


@dataclass(kw_only=True)
class CandidatesConfig:
    """How candidates are made, ranked and paired.

    Attributes:
        prompts: prompt file.
        num_prompts: use only the first so many prompts.
        candidates_per_prompt: N.
        rewards: rewards that rank the candidates; those that are `eval_only` are only written
            down.
        combine: how several rewards become one score: `sum` of weighted scores, each by its own
            `normalize`; or per prompt their z-scores summed (`zscore`), their ranks averaged
            (`rank`), or GDPO (`gdpo`: z-scores per prompt summed, then normalized over everything).
        rule: `best_worst`, `all_pairs` with a gap over `min_gap`, `top_k` ranks, or `pareto`: every
            two of which one is at least as good in each reward and better in one.
        min_gap: smallest score gap of a pair.
        top_k: ranks that are paired with each other under `top_k`.
        sampling: how candidates are sampled.
    """

    prompts: str = ""
    num_prompts: int | None = None
    candidates_per_prompt: int = 8
    rewards: list[RewardConfig] = field(default_factory=lambda: [RewardConfig()])
    combine: Combination = "sum"
    rule: PairRule = "best_worst"
    min_gap: float = 0.0
    top_k: int = 4
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass(kw_only=True)
class ReferenceConfig:
    """Whether the reference moves.

    Attributes:
        reference_update: move the reference: never, by EMA after every step, or by a copy of the
            policy every `reference_update_steps` steps.
        reference_decay: EMA decay of a moving reference.
        reference_update_steps: interval of copies in optimizer steps.
    """

    reference_update: Literal["never", "ema", "copy"] = "never"
    reference_decay: float = 0.999
    reference_update_steps: int = 500


@dataclass(kw_only=True)
class PreferenceConfig:
    """The preference loss on log-ratios, shared by every preference method.

    Attributes:
        loss_type: member of the family in `mmalign.objectives.preference`; `aot`, `sft`, `simpo`
            and `sigmoid_norm` exist for texts only.
        label_smoothing: assumed share of flipped labels, for `robust`, `cdpo`, `exo_pair` (above
            0), `aot` and `aot_unpaired`, in [0, 0.5).
        alpha: order of the alpha divergence, for `alpha`.
        offset_scale: multiplies the score margin of each pair, for `offset`.
        length_normalize: divide log-ratios of texts by their number of tokens first.
        target_margin: margin in nats that `simpo` asks for.
        discopop_tau: temperature of the mixture in `discopop`.
    """

    loss_type: LossType = "sigmoid"
    label_smoothing: float = 0.0
    alpha: float = 0.5
    offset_scale: float = 1.0
    length_normalize: bool = False
    target_margin: float = 0.5
    discopop_tau: float = 0.05


@dataclass(kw_only=True)
class CurriculumConfig:
    """Curriculum over pairs: large gaps (easy) first, smaller ones added stage by stage.

    Attributes:
        difficulty: `rank_gap` (the paper) or `score_gap` (the authors' code).
        scope: ranks and thresholds per `prompt` or `global` over all pairs.
        num_buckets: number of stages.
        stage_steps: optimizer steps per stage; the last stage lasts until `max_steps`.
        keep_threshold: pairs with a smaller score gap are dropped.
    """

    difficulty: Literal["rank_gap", "score_gap"] = "rank_gap"
    scope: Literal["prompt", "global"] = "prompt"
    num_buckets: int = 5
    stage_steps: int = 400
    keep_threshold: float = 0.0


@dataclass(kw_only=True)
class TrainConfig:
    """Options of every training run.

    Attributes:
        output_dir: the run's folder.
        seed: base seed of everything.
        max_steps: optimizer steps.
        per_device_train_batch_size: pairs per forward on each process.
        gradient_accumulation_steps: forwards per optimizer step.
        learning_rate: peak learning rate.
        lr_scheduler_type: `constant_with_warmup`, `linear` or `cosine`.
        warmup_steps: optimizer steps of linear warm-up.
        weight_decay: AdamW weight decay.
        adam_beta1: AdamW beta1.
        adam_beta2: AdamW beta2.
        adam_epsilon: AdamW epsilon.
        max_grad_norm: gradient clipping norm.
        mixed_precision: `no`, `fp16` or `bf16`.
        gradient_checkpointing: recompute activations in the backward pass.
        channels_last: memory format of the denoiser, faster convolutions on GPU.
        ema_decay: keep an exponential average of the trained weights and save it; off when omitted.
        on_nan: a non-finite loss or gradient stops the run, or its step is skipped and counted.
        logging_steps: interval of metric lines.
        save_steps: interval of checkpoints; 0 saves only at the end.
        save_total_limit: checkpoints kept.
        resume_from_checkpoint: `latest`, a checkpoint folder, or nothing.
        report_to: trackers besides `metrics.jsonl`, which is always written: `tensorboard`,
            `wandb`, `trackio` (the extras of these names install them), or another of accelerate's.
        num_workers: data loader processes.
        ddp_timeout: with several processes, seconds to wait for one that does not answer.
    """

    output_dir: str = "runs/latest"
    seed: int = 0
    max_steps: int = 2000
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-5
    lr_scheduler_type: Literal["constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    warmup_steps: int = 0
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    channels_last: bool = False
    ema_decay: float | None = None
    on_nan: Literal["stop", "skip"] = "stop"
    logging_steps: int = 1
    save_steps: int = 500
    save_total_limit: int = 2
    resume_from_checkpoint: str | None = None
    report_to: list[str] = field(default_factory=list)
    num_workers: int = 0
    ddp_timeout: int = 1800


@dataclass(kw_only=True)
class EvalConfig:
    """Evaluation of base against aligned, done after training and, if asked for, during it.

    Attributes:
        prompts: file with one prompt per line (or .jsonl with `prompt`); no evaluation when
            omitted.
        num_prompts: use only the first so many prompts.
        images_per_prompt: images per prompt and model, each with its own seed.
        rewards: rewards to report for both models.
        judge: the reward that decides who wins; no training reward may be it.
        every_steps: while training, evaluate the policy every so many optimizer steps and append
            the result to `evaluations.jsonl`; 0 evaluates only afterwards.
        curve_prompts: use only the first so many prompts for that.
        early_stopping_metric: end training when this metric of the evaluations no longer rises, and
            put the best weights back: the name of a reward in `rewards`, best one that no training
            sees, or `diversity`. Never the judge, which would no longer be independent.
        early_stopping_patience: evaluations without a new best value before training ends.
    """

    prompts: str | None = None
    num_prompts: int | None = None
    images_per_prompt: int = 4
    rewards: list[RewardConfig] = field(default_factory=list)
    judge: RewardConfig | None = None
    every_steps: int = 0
    curve_prompts: int | None = None
    early_stopping_metric: str | None = None
    early_stopping_patience: int = 3


@dataclass(kw_only=True)
class RunConfig(ModelConfig, TrainConfig, ReferenceConfig):
    """Training of an image generator, compared with its base afterwards.

    Attributes:
        lora: what is trained.
        sampling: how images are sampled.
        evaluation: what is measured after training.
    """

    lora: LoraConfig = field(default_factory=LoraConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
