"""Options of topic overwriting: pairs that a model makes of its own answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mmalign.config.endpoint import EndpointConfig
from mmalign.config.parts import OnBadRow
from mmalign.config.vlm import GenerationConfig, VlmModelConfig

TopicStage = Literal[
    "sample",
    "split",
    "ask",
    "resample",
    "verify",
    "score",
    "similarity",
    "judge",
    "cluster",
    "select",
    "rewrite",
    "rescore",
    "pairs",
]
RoleBackend = Literal["self", "model", "endpoint", "shapes"]


@dataclass(kw_only=True)
class RoleConfig:
    """Who does one of the jobs of topic overwriting.

    Attributes:
        backend: `self`, the model that answers the questions; `model`, another local one;
            `endpoint`, a server; or `shapes`, the exact rules of Shapes world.
        model: the other local model.
        endpoint: the server.
    """

    backend: RoleBackend = "self"
    model: VlmModelConfig = field(default_factory=VlmModelConfig)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)


@dataclass(kw_only=True)
class SimilarityConfig:
    """Which crops of the image two statements are about, by CLIP.

    Attributes:
        clip_model: open_clip architecture or folder; Shapes world's own, with a warning, when
            omitted. The authors take `ViT-L-14-336` with `openai`.
        clip_pretrained: tag or weight file of a built-in architecture.
        window: side of the sliding window, as a share of the image's.
        step: distance of neighboring windows, as a share of the image's side.
        threshold: smallest Pearson correlation of two similarity maps of one topic, exclusive.
        batch_size: crops encoded at a time.
    """

    clip_model: str | None = None
    clip_pretrained: str | None = None
    window: float = 0.5
    step: float = 0.125
    threshold: float = 0.9
    batch_size: int = 64


@dataclass(kw_only=True)
class TopicCurriculumConfig:
    """Rejected answers from obvious to subtle.

    Attributes:
        enabled: order the pairs so; otherwise rejected answers take the worst candidates.
        warmup_share: share of the pairs, the first ones, that take the worst candidates.
    """

    enabled: bool = False
    warmup_share: float = 0.6


@dataclass(kw_only=True)
class TopicOverwriteConfig(VlmModelConfig):
    """Pairs by topic overwriting: the model's own answers, their facts replaced topic by topic.

    The options of the model are those of the one that answers the questions, which may instead be
    served by `endpoint`.

    Attributes:
        questions: `.jsonl` with `image`, `prompt` and perhaps `id`; a LLaVA `.json`; or a folder of
            images, all asked `prompt`.
        images: folder that image names are relative to; that of `questions` when omitted.
        prompt: what is asked where `questions` does not say.
        limit: use only the first so many questions.
        output_dir: folder of the stages, the page and the pairs.
        stage: run this stage alone, on what earlier ones left.
        until: run up to and including this stage.
        seed: base seed of everything that is drawn.
        endpoint: server of the answering model, when its `url` is given.
        responses: answers sampled per question (M).
        resamples: answers to each question about a fact.
        sampling: how answers are sampled.
        resampling: how questions about facts are answered.
        language: how facts are split and questions written.
        rewriting: how answers are rewritten.
        max_words: words of an answer that are split into facts; the rest is left out.
        max_facts: facts of an answer that are kept.
        yes_no_batch_size: yes/no questions per forward.
        splitter: splits answers into facts.
        writer: writes questions about facts.
        judge: says whether two facts or questions are about one topic.
        labeller: says how likely a fact is true.
        rewriter: puts other facts into an answer.
        similarity: the test by CLIP that comes before the judge.
        louvain_resolution: above 1 favors smaller topics.
        select: candidates of a topic: the likeliest and the least likely fact (`extreme`), or the
            last right and the last wrong one (`last_binary`, the authors' code).
        template: answer that is rewritten: drawn at `random` (the paper), or the one with the
            fewest edits (`min_edit`, the authors' code).
        min_topics: contested facts that a template must have.
        fallback: questions without a template give the answers with the best and the worst mean
            score (`mean_score`, the authors), or no pair (`drop`).
        on_bad_rewrite: leave out pairs of which an answer was rewritten badly (`drop`), or put the
            best or worst answer in its place (`fallback`, the authors).
        rescore: score rewritten answers and leave out pairs that came out in the wrong order.
        curriculum: from obvious to subtle rejected answers.
        chunk: questions after which progress is saved.
        page_questions: questions shown on the page.
        on_bad_row: policy for unusable rows of `questions` and unreadable images.
        max_pixels: images with more pixels are refused before they are decoded.
    """

    questions: str = ""
    images: str | None = None
    prompt: str = "Describe this picture in detail."
    limit: int | None = None
    output_dir: str = "topics"
    stage: TopicStage | None = None
    until: TopicStage | None = None
    seed: int = 0
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    responses: int = 10
    resamples: int = 1
    sampling: GenerationConfig = field(
        default_factory=lambda: GenerationConfig(temperature=0.7, top_p=0.95)
    )
    resampling: GenerationConfig = field(
        default_factory=lambda: GenerationConfig(temperature=0.7, top_p=0.95, max_new_tokens=64)
    )
    language: GenerationConfig = field(default_factory=GenerationConfig)
    rewriting: GenerationConfig = field(default_factory=GenerationConfig)
    max_words: int = 300
    max_facts: int = 20
    yes_no_batch_size: int = 16
    splitter: RoleConfig = field(default_factory=RoleConfig)
    writer: RoleConfig = field(default_factory=RoleConfig)
    judge: RoleConfig = field(default_factory=RoleConfig)
    labeller: RoleConfig = field(default_factory=RoleConfig)
    rewriter: RoleConfig = field(default_factory=RoleConfig)
    similarity: SimilarityConfig = field(default_factory=SimilarityConfig)
    louvain_resolution: float = 1.0
    select: Literal["extreme", "last_binary"] = "extreme"
    template: Literal["random", "min_edit"] = "random"
    min_topics: int = 3
    fallback: Literal["mean_score", "drop"] = "mean_score"
    on_bad_rewrite: Literal["drop", "fallback"] = "drop"
    rescore: bool = True
    curriculum: TopicCurriculumConfig = field(default_factory=TopicCurriculumConfig)
    chunk: int = 16
    page_questions: int = 24
    on_bad_row: OnBadRow = "stop"
    max_pixels: int = 50_000_000
