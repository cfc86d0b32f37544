"""The example of docs/audio.md over several seeds: what alignment gains and what it costs.

    python benchmarks/audio.py --seeds 5 --picture docs/audio.png

Runs the code of the page, prints a Markdown table of the means over seeds with their 95 %
intervals, and draws spectrograms of the same noise before and after.
"""

from __future__ import annotations

import argparse
import copy
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student
from tqdm.auto import tqdm

PAGE = Path(__file__).parents[1] / "docs" / "audio.md"
BASE_STEPS, ALIGN_STEPS = 300, 40
KL_WEIGHTS = (0.0, 0.3, 1.0)
SHOWN = 8


def main() -> None:
    """Run the seeds, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    example, started = load_example(), time.process_time()
    results: dict[str, list[dict[str, float]]] = {}
    pictures: dict[str, torch.Tensor] = {}
    for seed in tqdm(range(options.seeds), unit="seed"):
        for name, (sounds, numbers) in run_seed(example, seed).items():
            results.setdefault(name, []).append(numbers)
            pictures.setdefault(name, sounds[:SHOWN])
    sys.stdout.write(table(results) + "\n")
    seconds = (time.process_time() - started) / options.seeds
    sys.stdout.write(f"{seconds:.0f} s of CPU per seed\n")
    if options.picture:
        draw(pictures, options.picture)


def load_example() -> dict[str, Any]:
    """Run the code of the page, which defines what follows."""
    content: dict[str, Any] = {"__name__": "example"}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL):
        exec(compile(code, str(PAGE), "exec"), content)
    return content


def run_seed(
    example: dict[str, Any], seed: int
) -> dict[str, tuple[torch.Tensor, dict[str, float]]]:
    """Train a base model and align copies of it; returns the sounds and the numbers of each."""
    reward = example["LowPitch"]()
    base = example["train_base"](seed, BASE_STEPS)
    found = {"base": example["measure"](base, reward)}
    for kl_weight in KL_WEIGHTS:
        model = copy.deepcopy(base)
        example["align"](model, reward, seed, ALIGN_STEPS, kl_weight)
        found[f"aligned, `kl_weight` {kl_weight:g}"] = example["measure"](model, reward)
    return found


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Lay means and intervals out as Markdown."""
    columns = list(next(iter(results.values()))[0])
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, seeds in results.items():
        cells = [interval([numbers[column] for numbers in seeds]) for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def interval(values: list[float]) -> str:
    """Mean and half the width of its 95 % interval by Student's t."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


def draw(pictures: dict[str, torch.Tensor], path: Path) -> None:
    """Draw one row of spectrograms per model, low bands at the bottom."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(pictures), SHOWN, figsize=(SHOWN * 0.9, len(pictures) * 1.15), layout="constrained"
    )
    for row, (name, sounds) in zip(axes, pictures.items(), strict=True):
        row[0].set_title(name.replace("`", ""), loc="left", fontsize=8)
        for axis, sound in zip(row, sounds, strict=True):
            axis.imshow(sound[0], origin="lower", vmin=-1, vmax=1, cmap="magma")
            axis.set_xticks([])
            axis.set_yticks([])
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
