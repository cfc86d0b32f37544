"""Fuzz everything that reads what strangers wrote.

    python benchmarks/fuzz_readers.py [--seconds 600] [--only NAME] [--folder runs/fuzz]

Each target of `fuzz_targets` takes bytes, puts them where its reader looks, and reads. It may
succeed or raise `InputError` with one line; anything else is a finding. Targets take turns, each in
a process of its own, and what one came to is kept, so an interrupted campaign continues. Needs
`atheris`, which is not among the project's dependencies. `tests/test_fuzz.py` runs the same targets
with hypothesis, on JSON that is nearly right.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fuzz_targets import load_targets
from fuzz_targets.harness import check, prepare

TARGETS = load_targets()


def main() -> int:
    """Fuzz every target for its share of the time; 1 when there is a finding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=600, help="of all targets together")
    parser.add_argument("--only", help="one target, in this process")
    parser.add_argument("--folder", type=Path, default=Path("runs/fuzz"))
    arguments = parser.parse_args()
    if arguments.only:
        _fuzz(arguments.only, arguments.folder.resolve(), arguments.seconds)
        return 0
    share = arguments.seconds / sum(target.share for target in TARGETS.values())
    rows = [
        _one(name, arguments.folder.resolve(), max(1, round(share * target.share)))
        for name, target in TARGETS.items()
    ]
    total = sum(row["executions"] for row in rows)
    findings = [row["target"] for row in rows if row["finding"]]
    spent = sum(row["seconds"] for row in rows)
    print(f"{len(rows)} targets, {spent} s, {total} executions, findings: {findings or 'none'}")
    return int(bool(findings))


def _one(name: str, folder: Path, seconds: int) -> dict[str, Any]:
    """Fuzz one target in a process of its own, and keep what came of it."""
    place = folder / name
    if (place / "outcome.json").exists():
        known: dict[str, Any] = json.loads((place / "outcome.json").read_text())
        return known
    (place / "corpus").mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(TARGETS[name].seeds):
        (place / "corpus" / f"seed-{number}").write_bytes(seed)
    command = [sys.executable, __file__, "--only", name, f"--seconds={seconds}"]
    said = subprocess.run(
        [*command, f"--folder={folder}"], capture_output=True, text=True, check=False
    )
    done = re.search(r"^Done (\d+) runs in (\d+) second", said.stderr, re.MULTILINE)
    executed = re.search(r"^stat::number_of_executed_units:\s*(\d+)", said.stderr, re.MULTILINE)
    finding = said.returncode != 0
    if finding:
        (place / "finding.txt").write_text(said.stdout + said.stderr)
    row = {
        "target": name,
        "executions": int(executed[1]) if executed else 0,
        "seconds": int(done[2]) if done else 0,
        "finding": finding,
    }
    (place / "outcome.json").write_text(json.dumps(row))
    print(row, flush=True)
    return row


def _fuzz(name: str, folder: Path, seconds: int) -> None:
    import atheris

    with atheris.instrument_imports(include=["mmalign"]):
        for seed in TARGETS[name].seeds:
            with tempfile.TemporaryDirectory() as scratch:
                prepare(Path(scratch))
                read = check(name, Path(scratch), seed)
                assert read or not TARGETS[name].sound, f"{name} does not read its own seed"
    place = folder / name
    scratch_of_all = place / "scratch"
    scratch_of_all.mkdir(exist_ok=True)
    prepare(scratch_of_all)
    options = [f"-max_total_time={seconds}", "-print_final_stats=1", "-max_len=65536"]
    options += [f"-artifact_prefix={place}/", "-rss_limit_mb=4096", "-timeout=30"]

    def once(data: bytes) -> None:
        check(name, scratch_of_all, data)

    atheris.Setup([sys.argv[0], *options, str(place / "corpus")], once)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
