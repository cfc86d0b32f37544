"""The targets of `benchmarks/fuzz_readers.py`: one module per kind of reader."""

from __future__ import annotations

import importlib

from .harness import TARGETS, Target

MODULES = ("image_pairs", "answer_pairs", "texts", "hallucination", "replies", "saved")


def load_targets() -> dict[str, Target]:
    """Import every module of targets; returns all targets by name."""
    for name in MODULES:
        importlib.import_module(f".{name}", __name__)
    return TARGETS
