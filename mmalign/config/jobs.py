"""Options of everything that is not training: pairs, scores, samples, evaluation, export."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mmalign.config.parts import (
    CandidatesConfig,
    EvalConfig,
    ModelConfig,
    OnBadRow,
    SamplingConfig,
)


@dataclass(kw_only=True)
class PairsBuildConfig(ModelConfig, CandidatesConfig):
    """Candidates, scores, then pairs.

    Attributes:
        images: folder of existing candidates instead of sampling from `model`; `prompts` then
            names which image belongs to which prompt. Or webdataset shards, as `mmalign score`
            takes them, which need no `prompts`; the candidates of a prompt are in one shard.
        output: folder that receives candidates, scores and `metadata.jsonl`; of shards, one shard
            of pairs for each.
        num_shards: processes that share the work; the launcher's own number when 1.
        shard: index of this process.
        on_bad_row: policy for unreadable images.
    """

    images: str | None = None
    output: str = "pairs"
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
class PairsLabelConfig:
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
        host: address to listen on; on any but this machine's own the page needs a token.
        port: port to listen on; 0 takes a free one.
        token: secret that the page asks for; off the loopback one is made when omitted.
        on_bad_row: policy for unreadable images and prompts without two.
        max_pixels: images with more pixels count as bad.
    """

    images: str = ""
    prompts: str | None = None
    export: str | None = None
    database: str | None = None
    pairs_per_prompt: int | None = None
    host: str = "127.0.0.1"
    port: int = 8765
    token: str | None = None
    on_bad_row: OnBadRow = "stop"
    max_pixels: int = 50_000_000


@dataclass(kw_only=True)
class ScoreConfig:
    """Score a folder of images, or webdataset shards of any number of images.

    Attributes:
        reward: reward names, repeated for several.
        images: folder of images, or shards: a folder of .tar files, `folder/*.tar`, or
            `folder/{000..010}.tar`, in which `KEY.png` has its prompt in `KEY.txt` or `KEY.json`.
        prompts: prompt file of a folder of images: one line per image in sorted order, or .jsonl
            with `file_name`, `prompt`.
        output: parquet file; of shards a folder with one per shard, which a further run completes.
        batch_size: images scored at a time.
        options: keyword arguments per reward name.
        on_bad_row: policy for unreadable images.
        max_pixels: images with more pixels are refused before they are decoded.
        num_shards: processes that share the shards; the launcher's own number when 1.
        shard: index of this process.
    """

    reward: list[str] = field(default_factory=lambda: ["clip"])
    images: str = ""
    prompts: str | None = None
    output: str = "scores.parquet"
    batch_size: int = 32
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    on_bad_row: OnBadRow = "stop"
    max_pixels: int = 50_000_000
    num_shards: int = 1
    shard: int = 0


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
class EvaluateImageConfig(ModelConfig):
    """Compare a model with its base (or another adapter) on prompts.

    Attributes:
        base_adapter: adapter of the side compared against; the plain model when omitted.
        output_dir: folder for `summary.json`, `report.html` and the images.
        sampling: how images are sampled.
        evaluation: prompts, rewards and judge.
    """

    base_adapter: str | None = None
    output_dir: str = "runs/evaluation"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)


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
class EnvConfig:
    """What `mmalign env` prints.

    Attributes:
        json: print JSON instead of lines.
    """

    json: bool = False
