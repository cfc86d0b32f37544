"""The quickstart over several seeds: does the aligned model beat its base every time?

    python benchmarks/quickstart.py --seeds 5

Runs `mmalign quickstart image` once per seed, each in its own process, and prints a Markdown table
of the judge's win rate with its 95 % interval and of what may get worse beside it. Exits 1 when a
seed misses the target: a win rate of at least 0.70 whose interval lies above 0.5.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TARGET = 0.70
CHANCE = 0.5
METRICS = ("correct", "valid", "diversity")


def main() -> None:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="curriculum-dpo")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart-seeds"))
    options = parser.parse_args()
    summaries = [
        quickstart(options.method, seed, options.output / f"{options.method}-{seed}")
        for seed in range(options.seeds)
    ]
    sys.stdout.write(table(summaries) + "\n")
    reached = sum(reaches(summary) for summary in summaries)
    sys.stdout.write(f"{reached} of {len(summaries)} seeds reach the target\n")
    sys.exit(reached < len(summaries))


def quickstart(method: str, seed: int, output: Path) -> dict[str, Any]:
    """Run one seed, or read the summary that an earlier call left."""
    summary = output / "summary.json"
    if not summary.exists():
        command = [sys.executable, "-m", "mmalign", "quickstart", "image", "--method", method]
        command += ["--seed", str(seed), "--output_dir", str(output)]
        subprocess.run(command, check=True)
    return json.loads(summary.read_text())


def reaches(summary: dict[str, Any]) -> bool:
    """Say whether a seed reaches the target."""
    rate = summary["win_rate"]
    return rate["value"] >= TARGET and rate["ci95"][0] > CHANCE


def table(summaries: list[dict[str, Any]]) -> str:
    """Lay the seeds out as Markdown."""
    head = ["seed", "win rate", "95 % interval", *METRICS, "reward", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for summary in summaries:
        rate, before, after = summary["win_rate"], summary["before"], summary["after"]
        reward = next(iter(before))
        cells = [str(summary["seed"]), f"{rate['value']:.2f}"]
        cells.append(f"{rate['ci95'][0]:.2f} to {rate['ci95'][1]:.2f}")
        cells += [f"{before[name]:.2f} → {after[name]:.2f}" for name in (*METRICS, reward)]
        cells.append(f"{summary['wall_seconds']:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
