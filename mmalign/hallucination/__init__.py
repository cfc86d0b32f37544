"""Hallucination benchmarks: what an answer says against what its image shows, without torch."""
