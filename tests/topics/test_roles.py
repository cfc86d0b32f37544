"""Jobs done by asking a model: what it is asked, and what becomes of any reply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from PIL import Image

from mmalign.config import GenerationConfig
from mmalign.topics.roles import (
    ModelJudge,
    ModelLabeller,
    ModelRewriter,
    ModelSplitter,
    ModelWriter,
)
from mmalign.topics.types import Check, RewriteRequest, Statement
from mmalign.types import Question

GREEDY = GenerationConfig()


@dataclass
class Scripted:
    """Replies as a function of the question; keeps what it was asked."""

    reply: Callable[[str], str] = lambda prompt: ""
    chances: Callable[[str], tuple[float, float]] = lambda prompt: (0.0, 0.0)
    asked: list[Question] = field(default_factory=list)
    calls: int = 0
    fingerprint: str = "scripted"

    def generate(self, questions: Sequence[Question], config: GenerationConfig) -> list[str]:
        self.calls += 1
        self.asked += questions
        return [self.reply(question.prompt) for question in questions]

    def yes_no(self, questions: Sequence[Question], batch_size: int) -> list[tuple[float, float]]:
        self.calls += 1
        self.asked += questions
        return [self.chances(question.prompt) for question in questions]


def test_splitter_asks_all_at_once_about_the_first_words() -> None:
    model = Scripted(lambda prompt: "- A cat.\n- A mat.\n- A hat.")
    splitter = ModelSplitter(model=model, generation=GREEDY, max_words=3, max_facts=2)
    assert splitter.split(["one two three four", "five"]) == [["A cat.", "A mat."]] * 2
    assert model.calls == 1
    assert "Text: one two three\n" in model.asked[0].prompt
    assert "four" not in model.asked[0].prompt.split("Text:")[1]
    assert all(question.images == () for question in model.asked)


def test_writer_needs_as_many_questions_as_facts() -> None:
    replies = {"1. A cat.": "1. What is it?\n2. Where is it?", "1. A dog.": "1. What is it?"}
    model = Scripted(lambda prompt: next(r for key, r in replies.items() if key in prompt))
    writer = ModelWriter(model=model, generation=GREEDY)
    facts = [["A cat.", "On a mat."], ["A dog.", "In a box."]]
    assert writer.ask(facts) == [["What is it?", "Where is it?"], [None, None]]
    assert model.calls == 1
    assert "exactly 2 lines" in model.asked[0].prompt
    assert writer.prompt("What is it?", "It is a cat.").startswith("What is it?\n")
    assert "It is a cat." in writer.prompt("What is it?", "It is a cat.")


def test_writer_says_which_question_a_short_answer_belongs_to() -> None:
    model = Scripted(lambda prompt: "1. Is the cat black?")
    writer = ModelWriter(model=model, generation=GREEDY)
    found = writer.verify([[Statement("Black.", "What color is the cat?")]])
    assert found == [[Check("Is the cat black? Answer with yes or no.", True)]]
    assert "1. Black. (in reply to: What color is the cat?)" in model.asked[0].prompt


def test_judge_goes_by_the_likelier_word() -> None:
    model = Scripted(chances=lambda prompt: (0.6, 0.3) if "cat" in prompt else (0.2, 0.2))
    judge = ModelJudge(model=model, batch_size=4)
    assert judge.same_topic([("a cat", "b"), ("c", "d")], "fact") == [True, False]
    assert judge.same_topic([("a cat?", "b?")], "question") == [True]
    kinds = [question.prompt.splitlines()[0] for question in model.asked]
    assert kinds[0] == kinds[1] != kinds[2]


def test_labeller_shows_the_picture() -> None:
    picture = Image.new("RGB", (4, 4))
    model = Scripted(chances=lambda prompt: (0.7, 0.1))
    asked = [Question("Is it?", (picture,))]
    assert ModelLabeller(model=model, batch_size=4).probabilities(asked) == [(0.7, 0.1)]
    assert model.asked == asked


def test_rewriter_shows_the_picture_the_answer_and_every_correction() -> None:
    picture = Image.new("RGB", (4, 4))
    model = Scripted(lambda prompt: " A white cat. \n")
    request = RewriteRequest(
        Question("What is it?", (picture,)), "A black cat.", (("black", "white"), ("big", "small"))
    )
    assert ModelRewriter(model=model, generation=GREEDY).rewrite([request]) == ["A white cat."]
    (question,) = model.asked
    assert question.images == (picture,)
    for text in ("What is it?", "A black cat.", '1. not "black" but "white"', '2. not "big"'):
        assert text in question.prompt
