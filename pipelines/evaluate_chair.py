"""`mmalign evaluate chair`: captions with objects that are not in the image."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.hallucination import chair
from mmalign.hallucination.captions import read_captions
from mmalign.hallucination.objects import read_labels
from mmalign.pipelines._benchmark import Images, Task, Wording, answers_file, as_written, finish
from mmalign.pipelines._objects import known_objects, load_vocabulary
from mmalign.types import Question

if TYPE_CHECKING:
    from mmalign.config import EvaluateChairConfig
    from mmalign.hallucination.vocabulary import Vocabulary

WORDING = Wording("CHAIR", "image", "in the image", "images")


def run(config: EvaluateChairConfig) -> None:
    """Score captions and write `summary.json`, `report.html` and `cases.jsonl`.

    Raises:
        InputError: naming file and row, for answers or labels that cannot be used.
    """
    started = time.monotonic()
    vocabulary = load_vocabulary(config)
    path = answers_file(config, lambda: _tasks(config, vocabulary), "caption")
    own = config.responses is not None
    captions = read_captions(
        path,
        image_keys=(config.image_id_key if own else "image_id",),
        text_keys=(config.caption_key if own else "caption",),
        question_keys=("question", "prompt"),
    )
    objects, warnings = known_objects(config, captions, path, vocabulary)
    outcome = chair.evaluate(
        captions, objects, vocabulary, seed=config.seed, resamples=config.resamples
    )
    finish(config, outcome, WORDING, started, warnings)


def _tasks(config: EvaluateChairConfig, vocabulary: Vocabulary) -> list[Task]:
    """Ask about every labelled image, or without a file of labels about every image there is."""
    images = Images(config.images)
    if config.labels is not None:
        names = list(read_labels(Path(config.labels), vocabulary))
    else:
        names = images.names()
    where = config.labels or "images"
    return [
        Task(
            Question(config.prompt, (images.need(name, where),)),
            {"image_id": as_written(name), "question": config.prompt},
        )
        for name in names
    ]
