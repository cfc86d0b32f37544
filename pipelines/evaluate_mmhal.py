"""`mmalign evaluate mmhal`: open questions, rated by a rule or a language model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from mmalign.hallucination import mmhal, mmhal_rule
from mmalign.hallucination.records import clean, id_field, read_records, text_field
from mmalign.pipelines._benchmark import Images, Task, Wording, answers_file, finish
from mmalign.pipelines._judge import check_judge, endpoint_judge
from mmalign.types import InputError, Question

if TYPE_CHECKING:
    from mmalign.config import EvaluateMmhalConfig

WORDING = Wording("MMHal-Bench", "question", "a person says", "questions")
SHOWN_REASON = 600


def run(config: EvaluateMmhalConfig) -> None:
    """Rate answers and write `summary.json`, `report.html` and `cases.jsonl`.

    Raises:
        InputError: naming file and row, for answers that cannot be used, and for a judge that is
            out of reach or replies garbage.
    """
    started = time.monotonic()
    check_judge(config.judge, used=config.judge_by == "endpoint")
    if (config.reviews is not None) != (config.judge_by == "reviews"):
        raise InputError("reviews: --judge_by reviews and --reviews FILE belong together")
    path = answers_file(config, lambda: _tasks(config), "model_answer")
    items, warnings = mmhal.read_items(path, _template(config))
    judged = [mmhal_rule.judge(item) for item in items]
    coverage = [share for _, share in judged]
    ratings = [rating for rating, _ in judged]
    if config.judge_by != "rule":
        replies = _replies(config, items)
        ratings = [_rating(config, item, reply) for item, reply in zip(items, replies, strict=True)]
        warnings += _reading_warnings(config, replies)
    outcome = mmhal.evaluate(items, ratings, coverage, seed=config.seed, resamples=config.resamples)
    if config.judge_by == "rule":
        warnings.append(
            "rated by rule, which reads words only: not comparable with GPT-4's ratings"
        )
    title = f"MMHal-Bench, rated by {_judge_name(config)}"
    finish(config, outcome, WORDING._replace(title=title), started, warnings)


def _template(config: EvaluateMmhalConfig) -> Path | None:
    if config.labels is not None:
        return Path(config.labels)
    return None if config.responses is not None else _questions(config)


def _questions(config: EvaluateMmhalConfig) -> Path:
    if config.labels is None:
        raise InputError("labels: give --labels FILE, MMHal-Bench's template, for --model")
    return Path(config.labels)


def _replies(config: EvaluateMmhalConfig, items: Sequence[mmhal.Item]) -> list[str]:
    if config.reviews is not None:
        return mmhal.read_reviews(Path(config.reviews), items)
    judge = endpoint_judge(config.judge, Path(config.output_dir))

    def checked(reply: str) -> str:
        if mmhal.parse_fixed(reply) is None:
            raise ValueError("the reply has no 'Rating: N' with N from 0 to 6")
        return reply

    prompts = [mmhal.request_for(item) for item in items]
    with tqdm(total=len(prompts), desc="judge", unit="answer") as bar:
        replies = judge.ask_all(prompts, checked, [item.where for item in items], done=bar.update)
    return [reply or "" for reply in replies]


def _rating(config: EvaluateMmhalConfig, item: mmhal.Item, reply: str) -> mmhal.Rating:
    try:
        score = mmhal.parse_rating(reply, config.strict)
    except ValueError as error:
        raise InputError(f"{item.where}: {config.reviews}: {error}") from error
    return mmhal.Rating(score, clean(" ".join(reply.split())[:SHOWN_REASON]))


def _reading_warnings(config: EvaluateMmhalConfig, replies: Sequence[str]) -> list[str]:
    other = sum(mmhal.parse_official(r) != mmhal.parse_fixed(r) for r in replies)
    if not other:
        return []
    second = "fixed" if config.strict == "official" else "official"
    return [f"{other} of {len(replies)} ratings read differently with strict {second}"]


def _judge_name(config: EvaluateMmhalConfig) -> str:
    return config.judge.model_name if config.judge_by == "endpoint" else config.judge_by


def _tasks(config: EvaluateMmhalConfig) -> list[Task]:
    images = Images(config.images)
    tasks = []
    for record in read_records(_questions(config)):
        key = "image_id" if "image_src" not in record.fields else "image_src"
        name = id_field(record, key).rpartition("/")[2]
        text = text_field(record, "question")
        tasks.append(Task(Question(text, (images.need(name, record.where),)), {"question": text}))
    return tasks
