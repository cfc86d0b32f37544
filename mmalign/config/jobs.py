"""Options of everything that is not training: pairs, scores, samples, evaluation, export."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mmalign.config.parts import (
    CandidatesConfig,
    EvalConfig,
    Family,
    ModelConfig,
    OnBadRow,
    SamplingConfig,
)


@dataclass(kw_only=True)
class PairsBuildConfig(ModelConfig, CandidatesConfig):
    """Candidates, scores, then pairs.

    Attributes:
        images: folder of existing candidates instead of sampling from `model`; `prompts` then
            names which image belongs to which prompt. With `responses`, the folder that names of
            images are relative to. Or webdataset shards, as `mmalign score` takes them, which need
            no `prompts`; the candidates of a prompt are in one shard.
        responses: file of answers to questions about images (.jsonl, .json or .parquet, as `score`
            writes it), to be paired instead of images; rewards then are those of answers.
        output: folder that receives candidates, scores and `metadata.jsonl`; with `responses`,
            `pairs.jsonl` and images; of shards, one shard of pairs for each, and its scores.
        cache: folder of scores by image and prompt, shared with other runs and with `score`; of
            shards, with runs over the same shards.
        num_shards: processes that share the work; the launcher's own number when 1.
        shard: index of this process.
        on_bad_row: policy for unreadable images.
    """

    images: str | None = None
    responses: str | None = None
    output: str = "pairs"
    cache: str | None = None
    num_shards: int = 1
    shard: int = 0
    on_bad_row: OnBadRow = "stop"


@dataclass(kw_only=True)
class PairsCheckConfig:
    """Options of `pairs validate` and `pairs stats`.

    Attributes:
        path: folder, parquet file, webdataset shard(s) or `metadata.jsonl`.
        format: layout of `path`: of pairs of images, or of pairs of answers about images.
        images: folder that file names of images are relative to, in pairs of answers; the one of
            the file when omitted.
        output: picture of the gap histogram (`pairs stats`).
        max_pixels: images with more pixels count as bad.
    """

    path: str = ""
    format: Literal[
        "auto",
        "parquet",
        "webdataset",
        "imagefolder",
        "pickapic",
        "hpdv2",
        "win_lose",
        "vlm",
        "trl",
        "rlhf_v",
        "swift",
        "llava",
    ] = "auto"
    images: str | None = None
    output: str = "pairs.png"
    max_pixels: int = 50_000_000


@dataclass(kw_only=True)
class LabelPageConfig:
    """Where the page is served on which people choose between images.

    Attributes:
        host: address to listen on; on any but this machine's own the page needs a token.
        port: port to listen on; 0 takes a free one.
        token: secret that the page asks for; off the loopback one is made when omitted.
    """

    host: str = "127.0.0.1"
    port: int = 8765
    token: str | None = None


@dataclass(kw_only=True)
class PairsLabelConfig(LabelPageConfig):
    """Serve a page on which people choose between candidate images.

    Attributes:
        images: folder of candidates, which may stand alone right after the command: written by
            `pairs build` or `generate`, a folder of pairs, or any images that `prompts` describes.
        prompts: prompt file: .jsonl with `file_name`, `prompt`; or one prompt per line, to choose
            among the prompts the folder has, or for its images in sorted order.
        export: instead of serving, write what people decided as pairs (a new folder with
            `metadata.jsonl` beside `images/`, or a .parquet or .tar file) and end. The majority of
            each pair counts; ties are left out and counted; `source` is `people`.
        database: SQLite file of the judgements; `labels.sqlite` in the folder when omitted.
        pairs_per_prompt: pairs shown of each prompt; every two candidates when omitted.
        on_bad_row: policy for unreadable images and prompts without two.
        max_pixels: images with more pixels count as bad.
    """

    images: str = ""
    prompts: str | None = None
    export: str | None = None
    database: str | None = None
    pairs_per_prompt: int | None = None
    on_bad_row: OnBadRow = "stop"
    max_pixels: int = 50_000_000


@dataclass(kw_only=True)
class ScoreConfig:
    """Score a folder of images, webdataset shards of any number of images, or answers about images.

    Attributes:
        reward: reward names, repeated for several.
        images: folder of images, or shards: a folder of .tar files, `folder/*.tar`, or
            `folder/{train,val}-{000..010}.tar`, in which `KEY.png` has its prompt in `KEY.txt` or
            `KEY.json`.
            With `responses`, the folder that names of images are relative to; that of the file when
            omitted.
        prompts: prompt file of a folder of images: one line per image in sorted order, or .jsonl
            with `file_name`, `prompt`; the folder's `metadata.jsonl` when omitted.
        responses: file of answers to score instead of images: .jsonl, .json or .parquet with
            `prompt`, `response` and `image`.
        output: .parquet or .jsonl file, with a column per reward; with `responses` .jsonl keeps the
            rows as they are and adds `scores`; of shards a folder with one per shard, which a
            further run completes.
        cache: folder of scores by sample, shared with other runs and with `pairs build`; of shards,
            with runs over the same shards.
        batch_size: samples scored at a time; halved where memory ends.
        options: keyword arguments per reward name.
        on_bad_row: policy for unreadable images.
        max_pixels: images with more pixels are refused before they are decoded.
        num_shards: processes that share the shards; the launcher's own number when 1.
        shard: index of this process.
    """

    reward: list[str] = field(default_factory=lambda: ["clip"])
    images: str = ""
    prompts: str | None = None
    responses: str | None = None
    output: str = "scores.parquet"
    cache: str | None = None
    batch_size: int = 32
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    on_bad_row: OnBadRow = "stop"
    max_pixels: int = 50_000_000
    num_shards: int = 1
    shard: int = 0


@dataclass(kw_only=True)
class ServeRewardConfig:
    """Serve a reward to other machines, which ask it by the reward `http`.

    Attributes:
        reward: name of a reward, which may stand alone right after the command, or a dotted path.
        options: keyword arguments of the reward's class.
        device: torch device; `auto` takes the accelerator when there is one.
        host: address to listen on; on any but this machine's own the server needs a token.
        port: port to listen on; 0 takes a free one.
        token: secret that clients must show; off the loopback one is made when omitted.
        batch_size: samples scored at a time, of several requests where they wait; halved where
            memory ends.
        queue: requests held at a time; what comes beyond is asked to come back later.
        max_samples: samples per request.
        max_body_mib: largest request in MiB.
        max_pixels: images with more pixels are refused before they are decoded.
        max_total_pixels: requests whose images have more pixels together are refused before any is
            decoded, and no more are held decoded at a time: further requests wait.
    """

    reward: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    device: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8766
    token: str | None = None
    batch_size: int = 32
    queue: int = 64
    max_samples: int = 256
    max_body_mib: int = 64
    max_pixels: int = 50_000_000
    max_total_pixels: int = 50_000_000


@dataclass(kw_only=True)
class GenerateConfig(ModelConfig):
    """Sample images from a model, with or without an adapter.

    Attributes:
        prompts: prompt file.
        prompt: prompts given on the command line instead.
        output: folder for the images and their `metadata.jsonl`.
        images_per_prompt: images per prompt.
        sampling: how images are sampled.
    """

    prompts: str | None = None
    prompt: list[str] = field(default_factory=list)
    output: str = "images"
    images_per_prompt: int = 1
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass(kw_only=True)
class SubjectConfig:
    """One side of a comparison: a model, with or without an adapter, or a folder of images.

    Attributes:
        name: what tables and pages call it; what `model`, `adapter` or `images` is called when
            empty.
        model: checkpoint, as the option `model` of the command, which is taken when omitted.
        adapter: folder or file of a LoRA to load on top.
        adapter_scale: multiplier of that LoRA.
        family: family of `model`.
        revision: hub revision of `model`.
        variant: weight file variant of `model`.
        num_inference_steps: sampler steps of this model, where they differ from `sampling`.
        guidance_scale: guidance of this model, where it differs from `sampling`.
        images: folder of images, instead of a model.
        prompts: which image belongs to which prompt: .jsonl with `file_name`, `prompt`, or one line
            per image in sorted order; the folder's own `metadata.jsonl` when omitted.
    """

    name: str = ""
    model: str | None = None
    adapter: str | None = None
    adapter_scale: float = 1.0
    family: Family = "auto"
    revision: str | None = None
    variant: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    images: str | None = None
    prompts: str | None = None


@dataclass(kw_only=True)
class BlindConfig(LabelPageConfig):
    """What people judge under `--judge label`.

    Attributes:
        images_per_prompt: show only the first so many images of each prompt.
        people: answers wanted of different people for each pair; with all of them the page closes.
    """

    images_per_prompt: int = 1
    people: int = 1


@dataclass(kw_only=True)
class EvaluateImageConfig(ModelConfig):
    """Compare models and folders of images on the same prompts, or a model with its base.

    Attributes:
        compare: what to compare, in short: `name=WHAT`, or `WHAT` alone, where `WHAT` is `base`
            (the plain `model`), a LoRA, the folder of a run, a model, or a folder of images.
        subjects: the same with every option; those of `compare` follow them. Without either, the
            plain model (or `base_adapter`) and the one with `adapter` are compared.
        baseline: name of the subject that the others are measured against; the first when omitted.
        base_adapter: adapter of the side compared against; the plain model when omitted.
        judge: who says which picture is better besides the rewards: `evaluation.judge` alone, or
            people as well, who are shown a page with two pictures and no names.
        label: that page.
        output_dir: folder for `summary.json`, `report.html`, scores and images.
        sampling: how images are sampled.
        evaluation: prompts, rewards and judge; with folders the prompts may be left to the first.
    """

    compare: list[str] = field(default_factory=list)
    subjects: list[SubjectConfig] = field(default_factory=list)
    baseline: str | None = None
    base_adapter: str | None = None
    judge: Literal["reward", "label"] = "reward"
    label: BlindConfig = field(default_factory=BlindConfig)
    output_dir: str = "runs/evaluation"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)


@dataclass(kw_only=True)
class GalleryConfig:
    """Show several runs on one page.

    Attributes:
        runs: folders of runs, which may stand alone right after the command.
        output: the page.
        title: its title.
        examples: prompts shown of each run.
    """

    runs: list[str] = field(default_factory=list)
    output: str = "gallery.html"
    title: str = "Gallery"
    examples: int = 6


@dataclass(kw_only=True)
class ExportConfig(ModelConfig):
    """Export an adapter for other programs.

    Attributes:
        format: `kohya` (A1111, ComfyUI) or `merged` (a full checkpoint with the adapter folded in).
        output: file (`kohya`) or folder (`merged`).
    """

    format: Literal["kohya", "merged"] = "kohya"
    output: str = "export"


@dataclass(kw_only=True)
class QuickstartImageConfig:
    """The main job in one command, on Shapes world.

    Attributes:
        method: preference method.
        seed: base seed of the whole job.
        output_dir: the run's folder; `runs/quickstart-<method>-<seed>` when omitted.
    """

    method: Literal["curriculum-dpo", "diffusion-dpo", "consistency-dpo"] = "curriculum-dpo"
    seed: int = 0
    output_dir: str | None = None


@dataclass(kw_only=True)
class QuickstartVlmConfig:
    """Less hallucination in one command, on Shapes world.

    Attributes:
        preset: method, a name in `mmalign.objectives.vlm_presets`.
        seed: base seed of the whole job.
        output_dir: the run's folder; `runs/quickstart-vlm-<preset>-<seed>` when omitted.
    """

    preset: str = "dpo"
    seed: int = 0
    output_dir: str | None = None


@dataclass(kw_only=True)
class ShapesPicturesConfig:
    """Pictures of Shapes world to try things on.

    Attributes:
        output: folder of `questions.jsonl` and `images/`.
        count: pictures.
        scenes: compositions of `train`, those that are `held_out` of it, or `stress`, four objects
            each.
        seed: of the scenes.
    """

    output: str = "pictures"
    count: int = 160
    scenes: Literal["train", "held_out", "stress"] = "train"
    seed: int = 0


@dataclass(kw_only=True)
class EnvConfig:
    """What `mmalign env` prints.

    Attributes:
        json: print JSON instead of lines.
    """

    json: bool = False
