"""The jobs of topic overwriting done exactly, by the grammar and the parser of Shapes world."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from mmalign.data.images import open_image
from mmalign.shapes.parser import parse_image
from mmalign.shapes.questions import YES, Query, read_question
from mmalign.shapes.scene import Scene
from mmalign.shapes.speech import (
    Count,
    Fact,
    Ground,
    Statement,
    read_sentence,
    split_sentences,
)
from mmalign.topics.types import Aspect, Check, RewriteRequest
from mmalign.topics.types import Statement as Claimed
from mmalign.types import ImageRef, InputError, Question

MAX_PIXELS = 64 * 64


class ShapesSplitter:
    """Every sentence of the grammar is a fact; what is no such sentence claims nothing."""

    def split(self, answers: Sequence[str]) -> list[list[str]]:
        """List the sentences of each answer, repeated ones once."""
        return [
            list(dict.fromkeys(s for s in split_sentences(a) if _read(s) is not None))
            for a in answers
        ]


class ShapesWriter:
    """Asks what is at the place of an object, where an object is, or what the background is."""

    def ask(self, facts: Sequence[Sequence[str]]) -> list[list[str | None]]:
        """Write wh-questions; a number of objects is not asked for."""
        return [[_wh(_read(fact)) for fact in group] for group in facts]

    def prompt(self, question: str, fact: str) -> str:
        """The captioner answers in sentences anyway."""
        return question

    def verify(self, statements: Sequence[Sequence[Claimed]]) -> list[list[Check | None]]:
        """Write yes/no questions; of what is said not to be there, yes means it is."""
        return [[_check(_read(s.text)) for s in group] for group in statements]


class ShapesTopicJudge:
    """One topic is one place, one object, or the background."""

    def same_topic(self, pairs: Sequence[tuple[str, str]], aspect: Aspect) -> list[bool]:
        """Compare what facts are about; questions must be the same."""
        if aspect == "question":
            return [first.casefold() == second.casefold() for first, second in pairs]
        return [_same(_read(first), _read(second)) for first, second in pairs]


class ShapesLabeller:
    """Looks at the picture: the probability of yes is 1 or 0."""

    def probabilities(self, questions: Sequence[Question]) -> list[tuple[float, float]]:
        """Return (p_yes, p_no) of each question.

        Raises:
            InputError: for a picture that is not of Shapes world, or a question that is not.
        """
        verdicts, scenes = [], dict[int, Scene]()
        for question in questions:
            try:
                asked = read_question(question.prompt)
            except ValueError as error:
                raise InputError(f"the labeller of Shapes world cannot read: {error}") from None
            picture = id(question.images[0])  # mostly the same one many times over
            if picture not in scenes:
                scenes[picture] = _scene(question)
            verdicts.append(asked.answer(scenes[picture]) == YES)
        return [(1.0, 0.0) if right else (0.0, 1.0) for right in verdicts]


class ShapesRewriter:
    """Replaces sentences; what the answer says already, in whatever words, is not said again.

    What is rightly said not to be there is left out instead: a hallucinated object goes without a
    trace, while a false denial stands in the answer.
    """

    def rewrite(self, requests: Sequence[RewriteRequest]) -> list[str]:
        """Return each answer with its facts replaced."""
        return [self._rewrite(request) for request in requests]

    def _rewrite(self, request: RewriteRequest) -> str:
        scene, edits = _scene(request.question), dict(request.edits)
        original = split_sentences(request.answer)
        said = [_read(sentence) for sentence in original if sentence not in edits]
        sentences = []
        for sentence in original:
            new = edits.get(sentence)
            if new is None:
                sentences.append(sentence)
            elif _read(new) not in said and not _is_true_denial(new, scene):
                said.append(_read(new))
                sentences.append(new)
        return " ".join(sentences)


def _read(sentence: str) -> Statement | None:
    with suppress(ValueError):
        return read_sentence(sentence)
    return None


def _wh(fact: Statement | None) -> str | None:
    if isinstance(fact, Ground):
        return Query(asked="background").text
    if not isinstance(fact, Fact):
        return None
    if fact.place:
        return Query(asked="what", about=Fact(place=fact.place)).text
    if fact.name:
        return Query(asked="place", about=Fact(shape=fact.shape, color=fact.color)).text
    return None


def _check(fact: Statement | None) -> Check | None:
    if isinstance(fact, Ground):
        return Check(Query(asked="is", about=fact).text)
    if not isinstance(fact, Fact):
        return None
    there = Fact(shape=fact.shape, color=fact.color, size=fact.size, place=fact.place)
    return Check(Query(asked="presence", about=there).text, fact.present)


def _same(first: Statement | None, second: Statement | None) -> bool:
    if isinstance(first, Fact) and isinstance(second, Fact):
        if first.place and second.place:
            return first.place == second.place
        return first.name is not None and first.name == second.name
    kinds = (Ground, Count)
    return any(isinstance(first, kind) and isinstance(second, kind) for kind in kinds)


def _is_true_denial(sentence: str, scene: Scene) -> bool:
    fact = _read(sentence)
    return isinstance(fact, Fact) and not fact.present and fact.holds(scene)


def _scene(question: Question) -> Scene:
    image = question.images[0]
    if isinstance(image, ImageRef):
        image = open_image(image, max_pixels=MAX_PIXELS)
    try:
        return parse_image(image).scene
    except ValueError as error:
        raise InputError(f"the jobs of Shapes world need its pictures: {error}") from None
