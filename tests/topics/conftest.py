"""A small made-up world of topics, whose jobs are done by rules that can be read at a glance.

An answer is sentences `thing is value`; the truth is a table. Two facts are about one topic if they
are about the same thing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mmalign.config import GenerationConfig, TopicOverwriteConfig
from mmalign.data.files import write_jsonl
from mmalign.randomness import derive_seed
from mmalign.topics.items import Item
from mmalign.topics.questions import read_questions
from mmalign.topics.team import Job, Team
from mmalign.topics.types import Check, RewriteRequest, Statement
from mmalign.types import Question

TRUTH = {"cat": "black", "mat": "red", "hat": "blue", "dog": "big", "sky": "gray"}
VALUES = ("black", "red", "blue", "big", "gray")


@dataclass
class World:
    """Does every job; `log` counts what it was asked."""

    log: dict[str, int] = field(default_factory=dict)
    fail_after: int | None = None

    fingerprint = "world"

    def _note(self, name: str, count: int) -> None:
        self.log[name] = self.log.get(name, 0) + count
        if self.fail_after is not None and sum(self.log.values()) > self.fail_after:
            raise KeyboardInterrupt

    def generate(self, questions: Sequence[Question], config: GenerationConfig) -> list[str]:
        self._note("generate", len(questions))
        answers = []
        seen: Counter[tuple[bytes, str]] = Counter()
        for question in questions:
            picture: Any = question.images[0]
            key = (picture.tobytes(), question.prompt)
            draw = derive_seed(config.seed, key[0].hex(), key[1], seen[key])
            seen[key] += 1
            if question.prompt.startswith("What is the "):
                things = [question.prompt.removeprefix("What is the ").rstrip("?")]
            else:
                things = list(TRUTH)
            answers.append(" ".join(self._say(thing, draw) for thing in things))
        return answers

    def _say(self, thing: str, draw: int) -> str:
        wrong = derive_seed(draw, thing) % 3 == 0
        value = VALUES[derive_seed(draw, thing, "value") % 5] if wrong else TRUTH[thing]
        return f"{thing} is {value}."

    def split(self, answers: Sequence[str]) -> list[list[str]]:
        self._note("split", len(answers))
        return [[f"{part.strip()}." for part in a.split(".") if " is " in part] for a in answers]

    def ask(self, facts: Sequence[Sequence[str]]) -> list[list[str | None]]:
        self._note("ask", len(facts))
        return [[f"What is the {fact.split()[0]}?" for fact in group] for group in facts]

    def prompt(self, question: str, fact: str) -> str:
        return question

    def verify(self, statements: Sequence[Sequence[Statement]]) -> list[list[Check | None]]:
        self._note("verify", len(statements))
        return [[Check(f"Is it so? {s.text}") for s in group] for group in statements]

    def same_topic(self, pairs: Sequence[tuple[str, str]], aspect: Any) -> list[bool]:
        self._note(f"judge {aspect}", len(pairs))
        at = 0 if aspect == "fact" else 3
        return [a.split()[at] == b.split()[at] for a, b in pairs]

    def probabilities(self, questions: Sequence[Question]) -> list[tuple[float, float]]:
        self._note("label", len(questions))
        found = []
        for question in questions:
            thing, _, value = question.prompt.removeprefix("Is it so? ").rstrip(".").split()
            sure = 0.6 + 0.3 * (derive_seed(question.prompt) % 100) / 100
            right = TRUTH[thing] == value
            found.append((sure, 1 - sure) if right else (1 - sure, sure))
        return found

    def rewrite(self, requests: Sequence[RewriteRequest]) -> list[str]:
        self._note("rewrite", len(requests))
        texts = []
        for request in requests:
            text = request.answer
            for old, new in request.edits:
                text = text.replace(old, new)
            texts.append(text)
        return texts

    def maps(self, image: Image.Image, texts: Sequence[str]) -> NDArray[np.float64]:
        """Facts about things whose names begin alike look at the same crops."""
        self._note("maps", 1)
        rows = [np.random.default_rng(ord(text[1])).normal(size=9) for text in texts]
        return np.array(rows).reshape(len(texts), 9)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def make_team() -> Callable[[World], Team]:
    def make(world: World) -> Team:
        jobs: dict[str, Any] = {
            name: Job(f"world {name}", lambda: world)
            for name in ("splitter", "writer", "judge", "labeller", "rewriter", "similarity")
        }
        return Team(answerer=Job("world", lambda: world), **jobs)

    return make


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., TopicOverwriteConfig]:
    """Options for `count` questions about small pictures."""

    def make(count: int = 5, **options: Any) -> TopicOverwriteConfig:
        folder = tmp_path / "questions"
        folder.mkdir(exist_ok=True)
        rows = []
        for number in range(count):
            Image.new("RGB", (12, 10), (10 * number, 0, 0)).save(folder / f"{number}.png")
            rows.append({"image": f"{number}.png", "prompt": "What is there?", "id": f"q{number}"})
        write_jsonl(folder / "questions.jsonl", rows)
        return TopicOverwriteConfig(
            **{
                "questions": str(folder / "questions.jsonl"),
                "output_dir": str(tmp_path / "out"),
                "responses": 4,
                "chunk": 2,
                **options,
            }
        )

    return make


@pytest.fixture
def read() -> Callable[[TopicOverwriteConfig], list[Item]]:
    return lambda config: read_questions(config)[0]
