"""Grouping facts into topics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mmalign.topics.types import Edge, Position


def cluster_facts(
    facts: Sequence[Position], edges: Iterable[Edge], *, resolution: float, seed: int
) -> list[list[Position]]:
    """Find the communities of the graph whose edges join facts of one topic.

    Louvain's method (Blondel et al. 2008) on unweighted edges, as networkx has it. The authors
    leave it unseeded; here the same facts, edges and seed give the same topics.

    Args:
        facts: every fact; one without edges is a topic of its own.
        edges: pairs of facts, in any order.
        resolution: above 1 favors smaller topics.
        seed: order in which facts are moved.

    Returns:
        Topics, each sorted, in the order of their first facts.
    """
    import networkx

    graph = networkx.Graph()
    graph.add_nodes_from(sorted(facts))
    graph.add_edges_from(sorted((min(edge), max(edge)) for edge in edges))
    found = networkx.community.louvain_communities(graph, resolution=resolution, seed=seed % 2**32)
    return sorted(sorted(topic) for topic in found)
