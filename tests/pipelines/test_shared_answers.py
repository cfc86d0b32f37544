"""Two processes share out what a vision-language model is asked, and get one process's answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image
from two_processes import in_two

from mmalign import processes
from mmalign.accelerator import make_accelerator
from mmalign.adapters._answers import draw_keys
from mmalign.config import GenerationConfig, TrainConfig
from mmalign.pipelines._shared_answers import shared_answers
from mmalign.types import InputError, Question

PICTURES = [Image.new("RGB", (2, 2), color) for color in ("red", "blue", "green")]
ASKED = [
    Question(f"{number}?", (PICTURES[number % 3],) if number % 4 else ()) for number in range(9)
]


class Speaker:
    """Answers with its draws; counts what it was asked."""

    family = "fake"

    def __init__(self, bad: str = "") -> None:
        self.bad, self.asked = bad, 0

    def generate(self, questions: Sequence[Question], config: GenerationConfig) -> list[str]:
        self.asked += len(questions)
        keys = draw_keys(questions, config.seed) if config.temperature else [0] * len(questions)
        if any(question.prompt == self.bad for question in questions):
            raise InputError(f"question {self.bad}: cannot be used")
        return [f"{q.prompt} {key}" for q, key in zip(questions, keys, strict=True)]

    def yes_no(self, questions: Sequence[Question], batch_size: int) -> list[tuple[float, float]]:
        self.asked += len(questions)
        return [(float(q.prompt[:-1]), float(len(q.images))) for q in questions]


def run_in_two(action: object, folder: Path) -> None:
    def connected() -> None:
        make_accelerator(TrainConfig(output_dir=str(folder)), cpu=True)
        action()  # type: ignore[operator]

    ended = in_two(connected, folder)
    assert ended.codes == [0, 0], ended.output


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_those_of_one_process(temperature: float, tmp_path: Path) -> None:
    config = GenerationConfig(batch_size=2, temperature=temperature)
    spoken = Speaker().generate(ASKED, config)
    judged = Speaker().yes_no(ASKED, 2)
    assert shared_answers(speaker := Speaker()) is speaker  # type: ignore[arg-type]

    def both() -> None:
        speaker = Speaker()
        shared = shared_answers(speaker)  # type: ignore[arg-type]
        assert shared.family == "fake"
        assert shared.generate(ASKED, config) == spoken
        # Three batches with images and two without, the last one of each with a single question.
        assert speaker.asked == (5, 4)[processes.rank()]
        speaker.asked = 0
        assert shared.yes_no(ASKED, 2) == judged
        assert speaker.asked == (5, 4)[processes.rank()]
        assert shared.generate([], config) == []

    run_in_two(both, tmp_path)


def test_draws_that_depend_on_each_other_are_not_shared(tmp_path: Path) -> None:
    config = GenerationConfig(batch_size=2, temperature=1.0)
    twice = [*ASKED, *ASKED]
    spoken = Speaker().generate(twice, config)
    assert len(set(spoken)) == len(twice)

    def both() -> None:
        speaker = Speaker()
        assert shared_answers(speaker).generate(twice, config) == spoken  # type: ignore[arg-type]
        assert speaker.asked == len(twice)

    run_in_two(both, tmp_path)


def test_what_one_cannot_answer_fails_on_both(tmp_path: Path) -> None:
    def both() -> None:
        shared = shared_answers(Speaker(bad="5?"))  # type: ignore[arg-type]
        with pytest.raises(InputError, match=r"question 5\?: cannot be used"):
            shared.generate(ASKED, GenerationConfig(batch_size=2))

    run_in_two(both, tmp_path)
