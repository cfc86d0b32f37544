"""The quick half of the list of faults; `benchmarks/faults.py` has all of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as for a script there; its rewards are named by dotted path
from fault_cases import load_cases  # noqa: E402
from fault_cases.harness import ROWS, Case, run_case  # noqa: E402
from fault_cases.toys import TOYS, use_toys  # noqa: E402

CASES = load_cases()
QUICK = [case for case in CASES if case.quick]


@pytest.fixture(scope="module")
def _toys(tmp_path_factory: pytest.TempPathFactory) -> None:
    use_toys(tmp_path_factory.mktemp("toys"))
    TOYS.all()


@pytest.mark.usefixtures("_toys")
@pytest.mark.parametrize("which", QUICK, ids=lambda case: f"{case.row}: {case.name}")
def test_every_fault_is_answered_as_expected(which: Case, tmp_path: Path) -> None:
    outcome = run_case(which, tmp_path / "case")
    assert outcome.tried > 0
    assert outcome.survived == outcome.tried, outcome.answer


def test_a_case_that_fails_hangs_or_dies_is_counted(tmp_path: Path) -> None:
    import os
    import time

    def fails(folder: Path, tally: Any) -> None:
        tally.point(True, "fine")
        raise RuntimeError("broken")

    actions = {
        "fails": (fails, 2, 1),
        "hangs": (lambda folder, tally: time.sleep(60), 1, 0),
        "dies": (lambda folder, tally: os._exit(1), 1, 0),
    }
    for name, (action, tried, survived) in actions.items():
        outcome = run_case(Case(1, name, "", action, True, 1.0), tmp_path / name)
        assert (outcome.tried, outcome.survived) == (tried, survived)


def test_every_row_of_the_list_has_cases() -> None:
    assert {case.row for case in CASES} == set(ROWS)
    names = [(case.row, case.name) for case in CASES]
    assert len(names) == len(set(names))
