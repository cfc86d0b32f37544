"""The stages that group facts into topics: CLIP, then the judge, then Louvain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmalign.randomness import derive_seed
from mmalign.topics.cluster import cluster_facts
from mmalign.topics.items import Batch, Item, Result, facts_of
from mmalign.topics.similarity import candidate_edges, map_correlations, window_offsets
from mmalign.topics.stages import Stage
from mmalign.topics.team import Cost
from mmalign.topics.types import Aspect, Position


class Similarity(Stage):
    """Which facts of different answers are about the same part of the picture."""

    name = "similarity"
    needs = ("verify",)
    sees_image = True

    def options(self, item: Item) -> Any:
        """Who compares, and the threshold."""
        return [self.team.similarity.identity, self.config.similarity.threshold]

    def cost(self, items: Sequence[Item]) -> Cost:
        """The crops of every image."""
        if self.team.similarity.exact:
            return Cost()
        windows = self.config.similarity
        return Cost(crops=len(items) * len(window_offsets(windows.window, windows.step)) ** 2)

    def run(self, items: Sequence[Item]) -> list[Result]:
        """Edges are [answer, fact, answer, fact, correlation]."""
        results: list[Result] = []
        for item in items:
            facts = facts_of(item)
            texts = list(dict.fromkeys(facts.values()))
            picture = item.ask().images[0]
            maps = self.team.similarity.worker().maps(picture, texts)  # type: ignore[arg-type]
            found = candidate_edges(
                facts, map_correlations(maps), texts, self.config.similarity.threshold
            )
            results.append({"edges": [[*a, *b, round(r, 6)] for (a, b), r in found]})
        return results


class Judge(Stage):
    """Which of these pairs are about the same topic: their facts first, then their questions.

    An edge needs all three tests, so asking the cheapest first and the others only about what is
    left gives the same edges as asking all about everything.
    """

    name = "judge"
    needs = ("verify", "similarity")

    def options(self, item: Item) -> Any:
        """Who judges."""
        return self.team.judge.identity

    def cost(self, items: Sequence[Item]) -> Cost:
        """At most two yes/no questions per pair."""
        if self.team.judge.exact:
            return Cost()
        pairs = sum(len(_different(item, item.results["similarity"]["edges"])) for item in items)
        return Cost(yes_no=2 * pairs)

    def run(self, items: Sequence[Item]) -> list[Result]:
        """Edges are [answer, fact, answer, fact]."""
        edges = [[edge[:4] for edge in item.results["similarity"]["edges"]] for item in items]
        for aspect, key in (("fact", "text"), ("question", "wh")):
            edges = self._surviving(items, edges, aspect, key)  # type: ignore[arg-type]
        return [{"edges": kept} for kept in edges]

    def _surviving(
        self, items: Sequence[Item], edges: list[list[list[int]]], aspect: Aspect, key: str
    ) -> list[list[list[int]]]:
        batch = Batch[tuple[str, str]]()
        places = []
        for item, pairs in zip(items, edges, strict=True):
            texts = [_texts(item, pair, key) for pair in pairs]
            places.append([batch.add(item, pair, pair) for pair in texts])
        verdicts = batch.run(lambda pairs: self.team.judge.worker().same_topic(pairs, aspect))
        return [
            [pair for pair, place in zip(pairs, slots, strict=True) if verdicts[place]]
            for pairs, slots in zip(edges, places, strict=True)
        ]


class Cluster(Stage):
    """Facts that hang together are a topic."""

    name = "cluster"
    needs = ("verify", "judge")

    def options(self, item: Item) -> Any:
        """Resolution and seed."""
        return [self.config.louvain_resolution, self.config.seed]

    def cost(self, items: Sequence[Item]) -> Cost:
        """No model."""
        return Cost()

    def run(self, items: Sequence[Item]) -> list[Result]:
        """Topics are lists of [answer, fact]."""
        results: list[Result] = []
        for item in items:
            topics = cluster_facts(
                list(facts_of(item)),
                [((a, b), (c, d)) for a, b, c, d in item.results["judge"]["edges"]],
                resolution=self.config.louvain_resolution,
                seed=derive_seed(self.config.seed, "louvain", item.id),
            )
            results.append({"topics": [[list(position) for position in t] for t in topics]})
        return results


def topics_of(item: Item) -> list[list[Position]]:
    """Read the topics back, after `cluster`."""
    return [[(k, f) for k, f in topic] for topic in item.results["cluster"]["topics"]]


def _texts(item: Item, edge: Sequence[int], key: str) -> tuple[str, str]:
    facts = item.results["verify"]["facts"]
    return facts[edge[0]][edge[1]][key], facts[edge[2]][edge[3]][key]


def _different(item: Item, edges: Sequence[Sequence[Any]]) -> set[tuple[str, str]]:
    return {_texts(item, edge, "text") for edge in edges}
