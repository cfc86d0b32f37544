"""Inject every fault of the project's list and write down how each was answered.

    uv run python benchmarks/faults.py [--rows 1,2] [--quick] [--output docs/reliability.md]

Every case runs in a process and a folder of its own, under a time limit. Outcomes are kept in
`runs/faults/outcomes.json` as they come, so that a campaign that was interrupted continues where it
was; `--again` runs the chosen rows anew.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib
import json
import logging
import os
import re
import shutil
import signal
import sys
from dataclasses import asdict
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

from fault_cases import load_cases
from fault_cases.harness import Case, Outcome, run_case
from fault_cases.table import write_page
from fault_cases.toys import TOYS, use_toys

PIPELINES = ("mmalign.pipelines.online_dpo", "mmalign.pipelines.vlm_dpo")
logger = logging.getLogger("faults")


def main() -> int:
    """Run the chosen cases; 1 when one of them has not survived."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    work: Path = arguments.folder.resolve()
    rows = {int(row) for row in arguments.rows.split(",")} if arguments.rows else set()
    chosen = [
        case
        for case in load_cases()
        if (not rows or case.row in rows)
        and (case.quick or not arguments.quick)
        and arguments.only in case.name
        and (not arguments.but or arguments.but not in case.name)
    ]
    outcomes = run_all(chosen, work, again=arguments.again)
    if arguments.output:
        known = [read_outcomes(work).get(_key(case)) for case in load_cases()]
        write_page([o for o in known if o is not None], load_cases(), arguments.output)
    return int(any(o.survived < o.tried for o in outcomes))


def run_all(cases: list[Case], work: Path, *, again: bool) -> list[Outcome]:
    """Run the cases that have no outcome yet; returns the outcomes of all."""
    known = read_outcomes(work)
    use_toys(work / "toys")
    missing = [case for case in cases if again or _key(case) not in known]
    if missing:
        _warm_up()
    for case in missing:
        folder = work / "cases" / re.sub(r"\W+", "-", _key(case))
        shutil.rmtree(folder, ignore_errors=True)
        outcome = run_case(case, folder)
        known[_key(case)] = outcome
        keep_outcome(work, _key(case), outcome)
        verdict = "ok" if outcome.survived == outcome.tried else "FAILED"
        logger.info(
            "row %d, %s: %s, %d of %d in %.1f s: %s",
            *(case.row, case.name, verdict, outcome.survived, outcome.tried),
            *(outcome.seconds, outcome.answer),
        )
        if outcome.survived == outcome.tried:
            shutil.rmtree(folder, ignore_errors=True)
    return [known[_key(case)] for case in cases]


def read_outcomes(work: Path) -> dict[str, Outcome]:
    """Read what is known already."""
    file = work / "outcomes.json"
    rows = json.loads(file.read_text()) if file.exists() else {}
    return {key: Outcome(**row) for key, row in rows.items()}


def keep_outcome(work: Path, key: str, outcome: Outcome) -> None:
    """Add an outcome to what is known; several campaigns may share the file."""
    with (work / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcomes = {**read_outcomes(work), key: outcome}
        temporary = work / ".outcomes.json"
        temporary.write_text(json.dumps({k: asdict(v) for k, v in outcomes.items()}, indent=1))
        os.replace(temporary, work / "outcomes.json")


def _key(case: Case) -> str:
    return f"{case.row}: {case.name}"


def _warm_up() -> None:
    """Import once what every case needs: forks share it."""
    import torch

    for name in ("diffusers", "transformers", *PIPELINES):
        importlib.import_module(name)
    # A fork of a process whose OpenMP threads have started hangs in its first parallel operation.
    torch.set_num_threads(1)
    TOYS.all()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="", help="numbers of the list's rows, such as 1,2")
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--but", default="", help="part of the names of cases to leave out")
    parser.add_argument("--quick", action="store_true", help="only what also runs as a test")
    parser.add_argument("--again", action="store_true", help="run known cases anew")
    parser.add_argument("--folder", type=Path, default=Path("runs/faults"))
    parser.add_argument("--output", type=Path, help="page to write, such as docs/reliability.md")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
