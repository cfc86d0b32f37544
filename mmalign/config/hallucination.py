"""Options of the hallucination benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mmalign.config.endpoint import EndpointConfig
from mmalign.config.parts import OnBadRow
from mmalign.config.vlm import GenerationConfig, VlmModelConfig

Strict = Literal["official", "fixed"]


@dataclass(kw_only=True)
class JudgeConfig(EndpointConfig):
    """A language model behind an OpenAI-compatible server that judges answers.

    Attributes:
        temperature: of the judge; 0 for the same reply every time.
        max_tokens: longest reply.
        seed: sent with every request.
    """

    temperature: float = 0.0
    max_tokens: int = 1024
    seed: int = 0


@dataclass(kw_only=True)
class BenchmarkConfig(VlmModelConfig):
    """What every hallucination benchmark needs: answers, or a model to get them from.

    Attributes:
        responses: file of answers in the benchmark's own format.
        labels: file that says what is true.
        annotations: folder of files that say what is true.
        images: folder of the images: for `model`, and to show them on the page.
        output_dir: folder for `summary.json`, `report.html` and `cases.jsonl`.
        generation: how `model` answers.
        on_missing: ids without an answer are an error, or are left out and counted.
        max_pixels: images with more pixels are refused before they are decoded.
        resamples: draws for the 95 % intervals.
        seed: base seed of those draws.
    """

    responses: str | None = None
    labels: str | None = None
    annotations: str | None = None
    images: str | None = None
    output_dir: str = "runs/benchmark"
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    on_missing: OnBadRow = "stop"
    max_pixels: int = 50_000_000
    resamples: int = 1000
    seed: int = 0


@dataclass(kw_only=True)
class CaptionBenchmarkConfig(BenchmarkConfig):
    """Options of benchmarks that look for objects in free descriptions.

    Attributes:
        vocabulary: words of objects in the format of CHAIR's `synonyms.txt`; the built-in words
            for COCO's 80 classes when omitted.
        strict: `official` reads a vocabulary file as the script does, stray spaces included.
    """

    vocabulary: str | None = None
    strict: Strict = "official"


@dataclass(kw_only=True)
class EvaluateChairConfig(CaptionBenchmarkConfig):
    """CHAIR: captions with objects that are not in the image.

    Attributes:
        image_id_key: field of an answer that holds the image's id.
        caption_key: field that holds the caption.
        prompt: what `model` is asked about every image.
    """

    image_id_key: str = "image_id"
    caption_key: str = "caption"
    prompt: str = "Please describe this image in detail."


@dataclass(kw_only=True)
class EvaluatePopeConfig(BenchmarkConfig):
    """POPE: is there an X in the image?

    Attributes:
        split: questions of the `annotations` folder: `random`, `popular`, `adversarial` or `all`;
            with `all`, `{split}` in `responses` stands for each.
        strict: read answers as the official script does, or as a person would.
        question_suffix: text after every question to `model`.
    """

    split: str | None = None
    strict: Strict = "official"
    question_suffix: str = " Please answer yes or no."


@dataclass(kw_only=True)
class EvaluateAmberConfig(BenchmarkConfig):
    """AMBER: objects of descriptions, and yes/no questions.

    Attributes:
        evaluation_type: which answers there must be: `g` descriptions, `d` questions (`de`
            existence, `da` attributes, `dr` relations), `a` all; `auto` goes by what the file has.
        strict: read answers as the official script does, or as a person would.
        matching: nouns match by equal words, or by spaCy's similarity as well.
        similarity_score: similarity over which nouns match.
        question_suffix: text after every yes/no question to `model`.
    """

    evaluation_type: Literal["auto", "a", "g", "d", "de", "da", "dr"] = "auto"
    strict: Strict = "official"
    matching: Literal["exact", "spacy"] = "exact"
    similarity_score: float = 0.8
    question_suffix: str = " Please answer Yes or No."


@dataclass(kw_only=True)
class EvaluateObjhalConfig(CaptionBenchmarkConfig):
    """Object HalBench: objects of answers that are not in the image.

    Attributes:
        judge_by: who reads the objects of an answer: the closed vocabulary, or a language model.
        judge: that language model.
        questions: file of questions with `image_id` and `question`, for `model`.
    """

    judge_by: Literal["rule", "endpoint"] = "rule"
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    questions: str | None = None


@dataclass(kw_only=True)
class EvaluateMmhalConfig(BenchmarkConfig):
    """MMHal-Bench: open questions, rated 0 to 6.

    Attributes:
        judge_by: who rates: a deterministic rule, a language model, or `reviews` for replies of one
            that are there already.
        judge: the language model.
        reviews: file of its replies, as the official script saves them.
        strict: read ratings as the official script does, or whatever marks stand around them.
    """

    judge_by: Literal["rule", "endpoint", "reviews"] = "rule"
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    reviews: str | None = None
    strict: Strict = "official"
