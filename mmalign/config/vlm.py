"""Options of vision-language models: the model, its answers, preference pairs and training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mmalign.config.parts import (
    LoraConfig,
    OnBadRow,
    PreferenceConfig,
    ReferenceConfig,
    TrainConfig,
)

VlmFamily = Literal["auto", "llava", "qwen_vl"]
VlmPairsFormat = Literal["auto", "vlm", "trl", "rlhf_v", "swift", "llava"]
LANGUAGE_TARGETS = [
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
]


@dataclass(kw_only=True)
class VlmModelConfig:
    """A vision-language checkpoint and how to hold it.

    Attributes:
        model: local folder in transformers' format, hub id, or `pkg://package/folder` for a folder
            shipped inside an installed package.
        family: model family; `auto` reads it from the checkpoint.
        revision: hub revision.
        adapter: folder of a LoRA in PEFT's format to load on top.
        device: torch device; `auto` takes the accelerator when there is one.
        dtype: dtype of weights that are not trained.
        offline: never contact a hub.
    """

    model: str = ""
    family: VlmFamily = "auto"
    revision: str | None = None
    adapter: str | None = None
    device: str = "auto"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    offline: bool = False


@dataclass(kw_only=True)
class GenerationConfig:
    """How answers are generated.

    Attributes:
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token, above it tokens are drawn.
        top_p: tokens are drawn from the smallest set with this probability.
        num_beams: beams, only with temperature 0.
        batch_size: questions answered at a time.
        seed: base seed; draws are keyed by (seed, question, images, times it was asked before).
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    num_beams: int = 1
    batch_size: int = 8
    seed: int = 0


@dataclass(kw_only=True)
class VlmLoraConfig(LoraConfig):
    """What is trained of a vision-language model: a LoRA of its language model, or all of it.

    The vision tower and the projector stay as they are.

    Attributes:
        targets: names of the layers inside the language model.
    """

    rank: int = 128
    alpha: float | None = 256
    targets: list[str] = field(default_factory=lambda: list(LANGUAGE_TARGETS))


@dataclass(kw_only=True)
class VlmPairsConfig:
    """Where preference pairs of answers come from.

    Attributes:
        path: file (.parquet, .jsonl, .json), folder of them, or a pattern of files.
        format: columns of the rows: `vlm` (prompt or question, chosen, rejected, image or images),
            TRL's vision preference, RLHF-V's JSON column, ms-swift's messages, LLaVA's
            conversations; `auto` recognises it.
        images: folder that file names of images are relative to; the one of the file when omitted.
        on_bad_row: `stop` at the first bad row, or `skip`, count and list them.
        max_pixels: images with more pixels are refused before they are decoded.
        max_images: rows with more images are bad.
        limit: use only the first `limit` pairs.
    """

    path: str = ""
    format: VlmPairsFormat = "auto"
    images: str | None = None
    on_bad_row: OnBadRow = "stop"
    max_pixels: int = 50_000_000
    max_images: int = 64
    limit: int | None = None


@dataclass(kw_only=True)
class TrialConfig:
    """A task that base and trained model are given, with an exact judge.

    Attributes:
        name: `shapes`, captions and yes/no questions about held-out pictures of Shapes world; or
            `module:Class`, called with `seed`, `generation` and the options.
        options: further keyword arguments, such as `count` of pictures.
    """

    name: str = "shapes"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class VlmDpoConfig(TrainConfig, ReferenceConfig, PreferenceConfig, VlmModelConfig):
    """Preference optimization of a vision-language model on pairs of answers.

    Attributes:
        preset: method, a name in `mmalign.objectives.vlm_presets`: `dpo`, `rlaif_v`, `llava_hound`,
            `mpo`, `simpo`, `ld_dpo`, `rlhf_v`, `rlhf_v_official`, `mdpo`, `mdpo_masked`, `chip`,
            `chip_fused`, `povid`, `v_dpo`, `sympo`, `opa`, `opa_token_level`, `tars` or
            `tars_official`.
        weights: new weights of parts of the preset by name; 0 takes a part out.
        perturbed: false replaces every perturbed text of the preset by the clean one.
        image_settings: settings of its image variants to change, such as `noise_timestep`.
        perturb_settings: settings of its text variants to change, such as `mode` and `omega`.
        clip_model: open_clip model that tells how much a token says about the image, for presets
            that perturb texts.
        clip_pretrained: its weights, a tag or a file.
        beta: strength of the pull to the reference, in units of one over a log-probability; the
            preset's own when omitted.
        lora: what is trained.
        pairs: where pairs come from.
        eval_pairs: held-out pairs that accuracy and margin are measured on before and after.
        trial: a task whose answers are judged before and after.
        max_length: longest sequence in tokens; longer answers are shortened, images never. The
            model's own context when omitted.
        share_prefix: compute image and question once for the answers that follow them: exact.
        group_images: put pairs about the same images into the same batch, and compute the images
            once for all of them: exact for a batch, whose pairs are then no longer independent.
        cache_reference: compute log-probabilities of the reference once and keep them on disk.
        cache_dir: folder of that cache; `<output_dir>/cache` when omitted.
        image_cache_mib: memory for features of images that were encoded before.
        num_answers: questions of `eval_pairs` that are answered before and after, for the report,
            and answers of `trial` shown there.
        generation: how they are answered.
        logits_chunk: answer positions whose logits exist at the same time.
    """

    preset: str = "dpo"
    weights: dict[str, float] = field(default_factory=dict)
    perturbed: bool = True
    image_settings: dict[str, Any] = field(default_factory=dict)
    perturb_settings: dict[str, Any] = field(default_factory=dict)
    clip_model: str | None = None
    clip_pretrained: str | None = None
    beta: float | None = None
    lora: VlmLoraConfig = field(default_factory=VlmLoraConfig)
    pairs: VlmPairsConfig = field(default_factory=VlmPairsConfig)
    eval_pairs: VlmPairsConfig | None = None
    trial: TrialConfig | None = None
    max_length: int | None = None
    share_prefix: bool = True
    group_images: bool = False
    cache_reference: bool = True
    cache_dir: str | None = None
    image_cache_mib: int = 1024
    logits_chunk: int = 256
    num_answers: int = 8
    generation: GenerationConfig = field(default_factory=GenerationConfig)
