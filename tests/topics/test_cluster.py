from __future__ import annotations

import itertools
import random

from mmalign.topics.cluster import cluster_facts
from mmalign.topics.types import Edge, Position

FACTS: list[Position] = [(answer, fact) for answer in range(4) for fact in range(2)]


def cliques() -> list[Edge]:
    """Everything about fact 0 of each answer, and about fact 1, and one stray edge."""
    edges = [
        ((a, fact), (b, fact)) for fact in (0, 1) for a, b in itertools.combinations(range(4), 2)
    ]
    return [*edges, ((0, 0), (3, 1))]


def test_a_stray_edge_joins_no_topics() -> None:
    topics = cluster_facts(FACTS, cliques(), resolution=1.0, seed=0)
    assert topics == [[(a, 0) for a in range(4)], [(a, 1) for a in range(4)]]


def test_facts_without_edges_are_topics_of_their_own() -> None:
    assert cluster_facts(FACTS[:3], [], resolution=1.0, seed=0) == [[p] for p in FACTS[:3]]
    assert cluster_facts([], [], resolution=1.0, seed=0) == []


def test_order_of_facts_and_edges_changes_nothing() -> None:
    rng = random.Random(0)
    facts: list[Position] = [(answer, fact) for answer in range(6) for fact in range(4)]
    edges = [
        (a, b) for a, b in itertools.combinations(facts, 2) if a[0] != b[0] and rng.random() < 0.2
    ]
    first = cluster_facts(facts, edges, resolution=1.0, seed=7)
    rng.shuffle(facts)
    turned = [(b, a) for a, b in edges]
    rng.shuffle(turned)
    assert cluster_facts(facts, turned, resolution=1.0, seed=7) == first
    assert len(first) > 1


def test_resolution_decides_how_large_topics_are() -> None:
    chain: list[Edge] = [((a, 0), (a + 1, 0)) for a in range(11)]
    facts: list[Position] = [(a, 0) for a in range(12)]
    coarse = cluster_facts(facts, chain, resolution=0.1, seed=0)
    fine = cluster_facts(facts, chain, resolution=3.0, seed=0)
    assert len(coarse) < len(fine)
