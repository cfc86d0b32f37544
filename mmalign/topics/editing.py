"""The stages that make a pair: select edits, rewrite the template, score what came out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from mmalign.config import TopicOverwriteConfig
from mmalign.randomness import derive_seed
from mmalign.topics.grouping import topics_of
from mmalign.topics.items import Batch, Item, Result, claims_of, score_of
from mmalign.topics.rewriting import rewrite_fault
from mmalign.topics.select import Selection, SelectionRule, mean_score, select_edits
from mmalign.topics.stages import Stage, add_check, oriented
from mmalign.topics.team import Cost, Team
from mmalign.topics.types import Check, Edit, RewriteRequest, Statement
from mmalign.types import Question

Side = Literal["chosen", "rejected"]
SIDES: tuple[Side, Side] = ("chosen", "rejected")
NO_TEMPLATE = "no answer with enough contested facts"
EQUAL = "best and worst answer have the same score"
SAME_TEXT = "chosen and rejected read the same"
NOT_IN_ORDER = "chosen does not score above rejected after rewriting"
NOTHING_LEFT = "no fact of a rewritten answer can be scored"


class Select(Stage):
    """Which facts of which answer are replaced by what."""

    name = "select"
    needs = ("sample", "verify", "score", "cluster")

    def __init__(
        self, team: Team, config: TopicOverwriteConfig, hardness: Mapping[str, float]
    ) -> None:
        """Take the place of every question on the curriculum."""
        super().__init__(team, config)
        self.hardness = hardness

    def options(self, item: Item) -> Any:
        """The rules, and the place on the curriculum."""
        config = self.config
        return [
            config.select,
            config.template,
            config.min_topics,
            config.fallback,
            config.seed,
            self.hardness.get(item.id, 0.0),
        ]

    def cost(self, items: Sequence[Item]) -> Cost:
        """No model."""
        return Cost()

    def run(self, items: Sequence[Item]) -> list[Result]:
        """Without a template, the best and the worst answer as they are."""
        return [self._select(item) for item in items]

    def _select(self, item: Item) -> Result:
        config, claims = self.config, claims_of(item)
        rule = SelectionRule(
            select=config.select,
            template=config.template,
            min_topics=config.min_topics,
            hardness=self.hardness.get(item.id, 0.0),
        )
        draw = derive_seed(config.seed, "template", item.id)
        found = select_edits(claims, topics_of(item), rule, draw)
        if found is None:  # `verify` lets no such question through
            return {"dropped": NO_TEMPLATE}
        result: Result = {
            "template": found.template,
            "best": found.best,
            "worst": found.worst,
            "chosen": [_to_json(edit) for edit in found.chosen],
            "rejected": [_to_json(edit) for edit in found.rejected],
        }
        if found.template is None:
            result |= self._ranked(found, {k: mean_score(c) for k, c in claims.items()})
        return result

    def _ranked(self, found: Selection, means: Mapping[int, float]) -> Result:
        if self.config.fallback == "drop":
            return {"dropped": NO_TEMPLATE}
        return {} if means[found.best] > means[found.worst] else {"dropped": EQUAL}


class Rewrite(Stage):
    """The template with its facts replaced, on both sides."""

    name = "rewrite"
    needs = ("sample", "select")
    sees_image = True

    def options(self, item: Item) -> Any:
        """Who rewrites, and what becomes of failures."""
        return [self.team.rewriter.identity, self.config.on_bad_rewrite]

    def cost(self, items: Sequence[Item]) -> Cost:
        """One generation per edited side."""
        if self.team.rewriter.exact:
            return Cost()
        return Cost(
            generations=sum(bool(item.results["select"][side]) for item in items for side in SIDES)
        )

    def run(self, items: Sequence[Item]) -> list[Result]:
        """A side is {text, answer, how}; `answer` is None where it is no sampled answer."""
        batch = Batch[RewriteRequest]()
        places = [
            batch.add(item, _request(item, side), (item.id, side))
            if item.results["select"][side]
            else None
            for item in items
            for side in SIDES
        ]
        replies = batch.run(lambda tasks: self.team.rewriter.worker().rewrite(tasks))
        texts = iter([None if slot is None else replies[slot] for slot in places])
        return [self._sides(item, texts) for item in items]

    def _sides(self, item: Item, texts: Iterator[str | None]) -> Result:
        result: Result = {}
        for side in SIDES:
            result[side] = self._side(item, side, next(texts))
            fault = result[side].get("fault")
            if fault and self.config.on_bad_rewrite == "drop":
                result.setdefault("dropped", f"the rewritten {side} answer fails: {fault}")
            elif fault:
                result.setdefault("lost", {})[f"rewritten {side} answers that fail: {fault}"] = 1
        if "dropped" not in result and len({result[side]["text"].strip() for side in SIDES}) == 1:
            result["dropped"] = SAME_TEXT
        return result

    def _side(self, item: Item, side: Side, text: str | None) -> dict[str, Any]:
        answers, selected = item.results["sample"]["answers"], item.results["select"]
        ranked = selected["best" if side == "chosen" else "worst"]
        if selected["template"] is None:
            return {"text": answers[ranked], "answer": ranked, "how": "ranked"}
        template = selected["template"]
        if text is None:
            return {"text": answers[template], "answer": template, "how": "unchanged"}
        fault = rewrite_fault(answers[template], text)
        if fault is None:
            return {"text": text, "answer": None, "how": "rewritten"}
        return {
            "text": answers[ranked],
            "answer": ranked,
            "how": "fallback",
            "fault": fault,
            "rewritten": text,
        }


class Rescore(Stage):
    """Rewritten answers are split, asked about and scored as sampled ones were.

    A rewriter may make things up. Sides that are sampled answers keep the scores they have.
    """

    name = "rescore"
    needs = ("verify", "score", "rewrite")
    sees_image = True

    def options(self, item: Item) -> Any:
        """Who splits, asks and labels."""
        team = self.team
        if not self.config.rescore:
            return None
        return [team.splitter.identity, team.writer.identity, team.labeller.identity]

    def cost(self, items: Sequence[Item]) -> Cost:
        """Two generations per rewritten side, and about as many yes/no questions as facts."""
        if not self.config.rescore:
            return Cost()
        team, generations, questions = self.team, 0, 0
        for item in items:
            new = sum(item.results["rewrite"][side]["answer"] is None for side in SIDES)
            generations += new * ((not team.splitter.exact) + (not team.writer.exact))
            template = item.results["select"]["template"]
            if new and not team.labeller.exact:
                questions += new * len(item.results["verify"]["facts"][template])
        return Cost(generations=generations, yes_no=questions)

    def run(self, items: Sequence[Item]) -> list[Result]:
        """A side is {score, facts}, its facts with their scores; both are empty when unknown."""
        scored = self._score(items) if self.config.rescore else {}
        results = []
        for item in items:
            result: Result = {
                side: self._known(item, side, scored.get((item.id, side))) for side in SIDES
            }
            chosen, rejected = (result[side]["score"] for side in SIDES)
            if self.config.rescore and (chosen is None or rejected is None):
                result["dropped"] = NOTHING_LEFT
            elif chosen is not None and rejected is not None and not chosen > rejected:
                result["dropped"] = NOT_IN_ORDER
            results.append(result)
        return results

    def _known(
        self, item: Item, side: Side, scored: list[tuple[str, float]] | None
    ) -> dict[str, Any]:
        answer = item.results["rewrite"][side]["answer"]
        if answer is not None:
            scored = [(claim.text, claim.score) for claim in claims_of(item)[answer]]
        if not scored:
            return {"score": None, "facts": []}
        mean = sum(score for _, score in scored) / len(scored)
        return {"score": mean, "facts": [list(pair) for pair in scored]}

    def _score(self, items: Sequence[Item]) -> dict[tuple[str, Side], list[tuple[str, float]]]:
        texts = [
            (item, side, item.results["rewrite"][side]["text"])
            for item in items
            for side in SIDES
            if item.results["rewrite"][side]["answer"] is None
        ]
        facts = self._facts(texts)
        batch = Batch[Question]()
        places = [
            [(fact, check, add_check(batch, item, check)) for fact, check in pairs]
            for (item, _, _), pairs in zip(texts, facts, strict=True)
        ]
        replies = batch.run(lambda tasks: self.team.labeller.worker().probabilities(tasks))
        return {
            (item.id, side): [
                (fact, score_of(oriented(item, replies[place], check)))
                for fact, check, place in slots
            ]
            for (item, side, _), slots in zip(texts, places, strict=True)
        }

    def _facts(self, texts: Sequence[tuple[Item, Side, str]]) -> list[list[tuple[str, Check]]]:
        """Split texts and write yes/no questions, as far as that is possible."""
        split = Batch[str]()
        slots = [split.add(item, text, text) for item, _, text in texts]
        facts = split.run(lambda tasks: self.team.splitter.worker().split(tasks))
        verify = Batch[Sequence[Statement]]()
        places = [
            verify.add(item, [Statement(fact) for fact in facts[slot]], tuple(facts[slot]))
            if facts[slot]
            else None
            for (item, _, _), slot in zip(texts, slots, strict=True)
        ]
        checks = verify.run(lambda tasks: self.team.writer.worker().verify(tasks))
        return [
            []
            if place is None
            else [
                (fact, check)
                for fact, check in zip(facts[slot], checks[place], strict=True)
                if check is not None
            ]
            for slot, place in zip(slots, places, strict=True)
        ]


def _request(item: Item, side: Side) -> RewriteRequest:
    selected = item.results["select"]
    answer = item.results["sample"]["answers"][selected["template"]]
    edits = tuple((edit["old"], edit["new"]) for edit in selected[side])
    return RewriteRequest(item.ask(), answer, edits)


def _to_json(edit: Edit) -> dict[str, Any]:
    return {
        "fact": edit.fact,
        "old": edit.old,
        "old_score": edit.old_score,
        "new": edit.new.text,
        "new_score": edit.new.score,
        "from": list(edit.new.position),
        "kind": edit.new.kind,
    }
