"""The stages from answers to scored facts; those that follow are in `grouping` and `editing`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, ClassVar

from mmalign.config import GenerationConfig, TopicOverwriteConfig, TopicStage
from mmalign.randomness import derive_seed
from mmalign.topics.items import Batch, Item, Result
from mmalign.topics.team import Cost, Team
from mmalign.topics.types import Check, Statement
from mmalign.types import InputError, Question

TOO_FEW = "fewer than two answers whose facts can be used"
NO_FACTS = "answers without facts"
NO_QUESTIONS = "facts without a wh-question"
NO_CHECKS = "facts without a yes/no question"
NO_ANSWER_CHECKS = "resampled answers without a yes/no question"


class Stage(ABC):
    """One step for many questions at once; knows nothing of files.

    `needs` names the stages whose results it reads, and `sees_image` whether it looks at images.
    """

    name: ClassVar[TopicStage]
    needs: ClassVar[tuple[TopicStage, ...]]
    sees_image: ClassVar[bool] = False

    def __init__(self, team: Team, config: TopicOverwriteConfig) -> None:
        """Remember who works and how."""
        self.team, self.config = team, config

    @abstractmethod
    def options(self, item: Item) -> Any:
        """Return, as JSON, what results depend on besides those of earlier stages."""

    @abstractmethod
    def cost(self, items: Sequence[Item]) -> Cost:
        """Count what the stage will ask of models."""

    @abstractmethod
    def run(self, items: Sequence[Item]) -> list[Result]:
        """Do it.

        Raises:
            InputError: naming the row, if a model or an endpoint fails.
        """


class Sample(Stage):
    """The model answers each question M times."""

    name = "sample"
    needs = ()
    sees_image = True

    def options(self, item: Item) -> Any:
        """Model, number of answers, how they are drawn."""
        config = self.config
        return [
            self.team.answerer.identity,
            config.responses,
            drawing(config.sampling),
            config.seed,
        ]

    def cost(self, items: Sequence[Item]) -> Cost:
        """M generations per question."""
        return Cost(generations=self.config.responses * len(items))

    def run(self, items: Sequence[Item]) -> list[Result]:
        """A model keys the draws of a question by its content, whatever else it is asked."""
        asked = [[item.ask()] * self.config.responses for item in items]
        answers = answer_all(self, items, asked, self.config.sampling)
        return [{"answers": texts} for texts in answers]


class Split(Stage):
    """Answers become facts."""

    name = "split"
    needs = ("sample",)

    def options(self, item: Item) -> Any:
        """Who splits, and how much of an answer."""
        return self.team.splitter.identity

    def cost(self, items: Sequence[Item]) -> Cost:
        """One generation per different answer."""
        if self.team.splitter.exact:
            return Cost()
        return Cost(generations=sum(len(set(item.results["sample"]["answers"])) for item in items))

    def run(self, items: Sequence[Item]) -> list[Result]:
        """Equal answers are split once."""
        batch = Batch[str]()
        places = [
            [
                batch.add(item, answer, answer) if answer.strip() else None
                for answer in item.results["sample"]["answers"]
            ]
            for item in items
        ]
        found = batch.run(lambda tasks: self.team.splitter.worker().split(tasks))
        results = []
        for slots in places:
            facts = [[] if slot is None else list(found[slot]) for slot in slots]
            results.append(_usable({"facts": facts}, facts, {NO_FACTS: facts.count([])}))
        return results


class Ask(Stage):
    """Every fact gets the wh-question that it answers."""

    name = "ask"
    needs = ("split",)

    def options(self, item: Item) -> Any:
        """Who asks."""
        return self.team.writer.identity

    def cost(self, items: Sequence[Item]) -> Cost:
        """One generation per different answer."""
        if self.team.writer.exact:
            return Cost()
        lists = [{tuple(facts) for facts in item.results["split"]["facts"]} for item in items]
        return Cost(generations=sum(len(groups - {()}) for groups in lists))

    def run(self, items: Sequence[Item]) -> list[Result]:
        """Facts without a question are left out."""
        batch = Batch[Sequence[str]]()
        places = [
            [
                batch.add(item, facts, tuple(facts)) if facts else None
                for facts in item.results["split"]["facts"]
            ]
            for item in items
        ]
        found = batch.run(lambda tasks: self.team.writer.worker().ask(tasks))
        results = []
        for item, slots in zip(items, places, strict=True):
            pairs = [
                [
                    [fact, question]
                    for fact, question in zip(
                        facts, [] if slot is None else found[slot], strict=True
                    )
                ]
                for facts, slot in zip(item.results["split"]["facts"], slots, strict=True)
            ]
            kept = [[pair for pair in answer if pair[1]] for answer in pairs]
            lost = sum(map(len, pairs)) - sum(map(len, kept))
            results.append(_usable({"facts": kept}, kept, {NO_QUESTIONS: lost}))
        return results


class Resample(Stage):
    """The model answers the question about each of its facts."""

    name = "resample"
    needs = ("ask",)
    sees_image = True

    def options(self, item: Item) -> Any:
        """Model, number of answers, how they are drawn, and the writer's prompt."""
        config = self.config
        return [
            self.team.answerer.identity,
            self.team.writer.identity,
            config.resamples,
            drawing(config.resampling),
            config.seed,
        ]

    def cost(self, items: Sequence[Item]) -> Cost:
        """`resamples` generations per fact."""
        facts = sum(len(answer) for item in items for answer in item.results["ask"]["facts"])
        return Cost(generations=self.config.resamples * facts)

    def run(self, items: Sequence[Item]) -> list[Result]:
        """A model keys the draws of a question by its content, whatever else it is asked."""
        asked = [self._questions(item) for item in items]
        replies = answer_all(self, items, asked, self.config.resampling)
        return [
            {"answers": self._arrange(item, texts)}
            for item, texts in zip(items, replies, strict=True)
        ]

    def _questions(self, item: Item) -> list[Question]:
        prompt = self.team.writer.worker().prompt
        return [
            item.ask(prompt(question, fact))
            for answer in item.results["ask"]["facts"]
            for fact, question in answer
            for _ in range(self.config.resamples)
        ]

    def _arrange(self, item: Item, texts: Sequence[str]) -> list[list[list[str]]]:
        replies, repeats = iter(texts), self.config.resamples
        return [
            [[next(replies) for _ in range(repeats)] for _ in answer]
            for answer in item.results["ask"]["facts"]
        ]


class Verify(Stage):
    """Facts and resampled answers become yes/no questions."""

    name = "verify"
    needs = ("ask", "resample")

    def options(self, item: Item) -> Any:
        """Who asks."""
        return self.team.writer.identity

    def cost(self, items: Sequence[Item]) -> Cost:
        """One generation per different list of facts and of resampled answers."""
        if self.team.writer.exact:
            return Cost()
        groups = {tuple(group) for item in items for group in _statements(item) if group}
        return Cost(generations=len(groups))

    def run(self, items: Sequence[Item]) -> list[Result]:
        """Facts that cannot be asked about are left out, resampled answers too."""
        batch = Batch[Sequence[Statement]]()
        places = [
            [batch.add(item, group, tuple(group)) if group else None for group in _statements(item)]
            for item in items
        ]
        found = batch.run(lambda tasks: self.team.writer.worker().verify(tasks))
        return [
            self._collect(item, [[] if slot is None else found[slot] for slot in slots])
            for item, slots in zip(items, places, strict=True)
        ]

    def _collect(self, item: Item, checks: Sequence[Sequence[Check | None]]) -> Result:
        lost: Counter[str] = Counter()
        answers = []
        asked, resampled = item.results["ask"]["facts"], item.results["resample"]["answers"]
        for number, (facts, replies) in enumerate(zip(asked, resampled, strict=True)):
            of_facts, of_replies = checks[2 * number], iter(checks[2 * number + 1])
            kept = []
            for (text, question), check, texts in zip(facts, of_facts, replies, strict=True):
                pairs = [(reply, next(of_replies)) for reply in texts if reply.strip()]
                lost[NO_ANSWER_CHECKS] += sum(c is None for _, c in pairs)
                if check is None:
                    lost[NO_CHECKS] += 1
                    continue
                good = [[reply, list(c)] for reply, c in pairs if c is not None]
                kept.append({"text": text, "wh": question, "check": list(check), "resampled": good})
            answers.append(kept)
        return _usable({"facts": answers}, answers, lost)


class Score(Stage):
    """The labeller says how likely each statement is true."""

    name = "score"
    needs = ("verify",)
    sees_image = True

    def options(self, item: Item) -> Any:
        """Who labels."""
        return self.team.labeller.identity

    def cost(self, items: Sequence[Item]) -> Cost:
        """One yes/no question per different statement of an image."""
        if self.team.labeller.exact:
            return Cost()
        return Cost(yes_no=sum(len({c[0] for c in _checks(item)}) for item in items))

    def run(self, items: Sequence[Item]) -> list[Result]:
        """Equal questions about one image are asked once."""
        batch = Batch[Question]()
        places = [[add_check(batch, item, check) for check in _checks(item)] for item in items]
        replies = batch.run(lambda tasks: self.team.labeller.worker().probabilities(tasks))
        results: list[Result] = []
        for item, slots in zip(items, places, strict=True):
            pairs = iter(
                [
                    oriented(item, replies[slot], check)
                    for slot, check in zip(slots, _checks(item), strict=True)
                ]
            )
            scores = [
                [
                    {"fact": next(pairs), "resampled": [next(pairs) for _ in fact["resampled"]]}
                    for fact in facts
                ]
                for facts in item.results["verify"]["facts"]
            ]
            results.append({"scores": scores})
        return results


def drawing(generation: GenerationConfig) -> dict[str, Any]:
    """Return what generated text depends on: not the batch, and a seed only where it draws.

    Seed 0 is left out, so that results of before seeds were part of this are still found.
    """
    options = asdict(generation)
    del options["batch_size"]
    if not (generation.seed and generation.temperature > 0):
        del options["seed"]
    return options


def answer_all(
    stage: Stage, items: Sequence[Item], asked: Sequence[Sequence[Question]], how: GenerationConfig
) -> list[list[str]]:
    """Have the model answer questions about several images at once, equal ones again each time."""
    parts = (stage.name, how.seed) if how.seed else (stage.name,)
    config = replace(how, seed=derive_seed(stage.config.seed, *parts))
    batch = Batch[Question]()
    for item, questions in zip(items, asked, strict=True):
        for number, question in enumerate(questions):
            batch.add(item, question, (item.id, number))
    model = stage.team.answerer
    texts = iter(batch.run(lambda questions: model.worker().generate(questions, config)))
    return [[next(texts).strip() for _ in questions] for questions in asked]


def add_check(batch: Batch[Question], item: Item, check: Sequence[Any]) -> int:
    """Add a yes/no question about an image."""
    return batch.add(item, item.ask(check[0]), (item.id, check[0]))


def oriented(item: Item, reply: Sequence[float], check: Sequence[Any]) -> list[float]:
    """Turn (p_yes, p_no) into (p_right, p_wrong) of the statement.

    Raises:
        InputError: naming the row, for probabilities that are none.
    """
    pair = [float(value) for value in reply]
    if len(pair) != 2 or not all(math.isfinite(p) and -1e-6 <= p <= 1 + 1e-6 for p in pair):
        raise InputError(f"{item.where}: the labeller answers {reply!r} to {check[0]!r}")
    return pair if check[1] else pair[::-1]


def _statements(item: Item) -> list[list[Statement]]:
    """List facts, then resampled answers, of each answer in turn."""
    groups = []
    asked, resampled = item.results["ask"]["facts"], item.results["resample"]["answers"]
    for facts, replies in zip(asked, resampled, strict=True):
        groups.append([Statement(text) for text, _ in facts])
        groups.append(
            [
                Statement(reply, question)
                for (_, question), texts in zip(facts, replies, strict=True)
                for reply in texts
                if reply.strip()
            ]
        )
    return groups


def _checks(item: Item) -> list[Sequence[Any]]:
    return [
        check
        for facts in item.results["verify"]["facts"]
        for fact in facts
        for check in (fact["check"], *(check for _, check in fact["resampled"]))
    ]


def _usable(result: Result, answers: Sequence[Sequence[Any]], lost: dict[str, int]) -> Result:
    """Note what was lost, and whether two answers are left."""
    counted = {reason: number for reason, number in lost.items() if number}
    if counted:
        result["lost"] = counted
    if sum(bool(answer) for answer in answers) < 2:
        result["dropped"] = TOO_FEW
    return result
