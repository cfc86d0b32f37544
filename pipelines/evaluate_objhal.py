"""`mmalign evaluate objhal`: Object HalBench, by rule or by a language model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from mmalign.hallucination import objhal
from mmalign.hallucination.captions import Caption, read_captions
from mmalign.hallucination.records import id_field, image_id, read_records, text_field
from mmalign.pipelines._benchmark import Images, Task, Wording, answers_file, as_written, finish
from mmalign.pipelines._judge import check_judge, endpoint_judge
from mmalign.pipelines._objects import known_objects, load_vocabulary
from mmalign.types import InputError, Question

if TYPE_CHECKING:
    from mmalign.config import EvaluateObjhalConfig

WORDING = Wording("Object HalBench", "image", "in the image", "images")
QUESTION_KEYS = ("question", "prompt")


def run(config: EvaluateObjhalConfig) -> None:
    """Score answers and write `summary.json`, `report.html` and `cases.jsonl`.

    Raises:
        InputError: naming file and row, for answers or labels that cannot be used, and for a judge
            that is out of reach or replies garbage.
    """
    started = time.monotonic()
    check_judge(config.judge, used=config.judge_by == "endpoint")
    vocabulary = load_vocabulary(config)
    path = answers_file(config, lambda: _tasks(config), "answer")
    captions = read_captions(
        path, text_keys=("answer", "text", "caption"), question_keys=QUESTION_KEYS
    )
    captions = [c._replace(text=c.text.replace("Assistant:", "").strip()) for c in captions]
    objects, warnings = known_objects(config, captions, path, vocabulary)
    listed = _listed(config, captions) if config.judge_by == "endpoint" else None
    outcome = objhal.evaluate(
        captions,
        objects,
        vocabulary,
        listed=listed,
        seed=config.seed,
        resamples=config.resamples,
    )
    title = f"Object HalBench, objects by {_reader(config)}"
    finish(config, outcome, WORDING._replace(title=title), started, warnings)


def _listed(config: EvaluateObjhalConfig, captions: Sequence[Caption]) -> list[list[str]]:
    judge = endpoint_judge(config.judge, Path(config.output_dir))
    prompts = [objhal.request_for(caption) for caption in captions]
    with tqdm(total=sum(p is not None for p in prompts), desc="judge", unit="answer") as bar:
        replies = judge.ask_all(
            prompts, objhal.parse_objects, [c.where for c in captions], done=bar.update
        )
    return [reply or [] for reply in replies]


def _reader(config: EvaluateObjhalConfig) -> str:
    return "rule" if config.judge_by == "rule" else config.judge.model_name


def _tasks(config: EvaluateObjhalConfig) -> list[Task]:
    if config.questions is None:
        raise InputError("questions: give --questions FILE with image_id and question for --model")
    images = Images(config.images)
    tasks = []
    for record in read_records(Path(config.questions)):
        name = image_id(id_field(record, "image_id"))
        text = text_field(record, *QUESTION_KEYS)
        image = images.need(name, record.where)
        tasks.append(
            Task(Question(text, (image,)), {"image_id": as_written(name), "question": text})
        )
    return tasks
