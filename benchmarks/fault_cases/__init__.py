"""The cases of `benchmarks/faults.py`: one module per kind of fault."""

from __future__ import annotations

import importlib

from .harness import CASES, Case

MODULES = (
    *("kills", "stops", "storage", "checkpoints", "numbers", "inputs", "rows", "names", "hostile"),
    *("injection", "faulty", "same", "network", "ranks"),
)


def load_cases() -> list[Case]:
    """Import every module of cases; returns all cases by row."""
    for name in MODULES:
        importlib.import_module(f".{name}", __name__)
    return sorted(CASES, key=lambda case: case.row)
