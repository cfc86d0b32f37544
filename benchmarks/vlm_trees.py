"""Time and memory of scoring branches of one image: plain sequences against packed trees.

    python benchmarks/vlm_trees.py --rounds 5

Forward and backward of the policy on the LLaVA of `vlm_dpo.py`, 576 image tokens: three pairs about
one image (`group_images`), and one pair under its question and under a perturbed one, as TARS has
it. `sequences` runs each prefix with each answer; `prefixes` computes a prefix once for its
answers, as every run does; `images` computes the image once for all of its questions. Ways
alternate; log-probabilities and gradients must agree.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from vlm_dpo import peak_of
from vlm_fixture import build, lora_settings

from mmalign.adapters import load_vlm
from mmalign.adapters._vlm import VlmFamily
from mmalign.config import VlmModelConfig, VlmPairsConfig
from mmalign.data.vlm_readers import read_vlm_pairs
from mmalign.types import Branches
from mmalign.vlm_lora import attach_vlm_lora

WAYS = {
    "sequences": {"share_prefix": False},
    "prefixes": {"share_prefix": True},
    "images": {"share_prefix": True, "share_images": True},
}
EQUAL = 1e-4


@dataclass
class Found:
    """What a way was measured to need: seconds per call, MiB, FLOPs; and what it computed."""

    seconds: list[float] = field(default_factory=list)
    live: float = 0.0
    flops: int = 0
    values: Tensor = field(default_factory=lambda: torch.zeros(0))
    gradient: Tensor = field(default_factory=lambda: torch.zeros(0))


def main() -> None:
    """Print a table per case; exit 1 when results disagree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), 576)
        model = VlmModelConfig(model=str(Path(folder) / "model"), offline=True)
        adapter = load_vlm(model, "cpu", for_training=True)
        attach_vlm_lora(adapter.model, lora_settings(), 0)
        cases = make_cases(adapter, str(Path(folder) / "pairs.jsonl"))
        failed = [report(name, measure(adapter, c, options.rounds)) for name, c in cases.items()]
    sys.exit(any(failed))


def make_cases(adapter: VlmFamily, path: str) -> dict[str, list[Branches]]:
    """Encode three pairs about the image of the first, and one under two questions."""
    pairs = read_vlm_pairs(VlmPairsConfig(path=path)).pairs
    encoded = [adapter.encode_pair(replace(pairs[i], images=pairs[0].images)) for i in range(3)]
    assert encoded[0].images is not None
    with torch.no_grad():
        image = adapter.encode_images(encoded[0].images)
    grouped = [Branches(e.prefix_ids, (e.chosen_ids, e.rejected_ids), image) for e in encoded]
    perturbed = encoded[0].prefix_ids.clone()
    words = encoded[0].prefix_text.nonzero()[:, 0]
    perturbed[words[1::3]] = adapter.chat.tokenizer.encode(" mo")[0]
    return {
        "three pairs about one image": grouped,
        "one pair, two questions": [grouped[0], grouped[0]._replace(prefix_ids=perturbed)],
    }


def measure(adapter: VlmFamily, batch: list[Branches], rounds: int) -> dict[str, Found]:
    """Run every way once for memory, once for FLOPs, then in alternation for time."""
    found = {name: Found() for name in WAYS}
    for name, way in WAYS.items():
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            found[name].values, found[name].gradient = call(adapter, batch, way)
        found[name].live = peak_of(profiled) / 2**20
        with FlopCounterMode(display=False) as counter:
            call(adapter, batch, way)
        found[name].flops = counter.get_total_flops()
    for _ in range(rounds):
        for name, way in WAYS.items():
            start = time.process_time()
            call(adapter, batch, way)
            found[name].seconds.append(time.process_time() - start)
    return found


def call(adapter: VlmFamily, batch: list[Branches], way: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Score, and go back through the margins; returns log-probs (N,) and a flat gradient."""
    parameters = [p for p in adapter.model.parameters() if p.requires_grad]
    sums = [[s.logps.sum() for s in row] for row in adapter.score(batch, **way)]
    margin = torch.stack([chosen - rejected for chosen, rejected in sums]).mean()
    gradients = torch.autograd.grad(margin, parameters)
    values = torch.stack([value for row in sums for value in row]).detach()
    return values, torch.cat([g.flatten() for g in gradients])


def report(case: str, found: dict[str, Found]) -> bool:
    """Print ratios to plain sequences, min/median/max; true when results disagree."""
    base = found["sequences"]
    print(case)
    print(f"{'way':<10} {'s':>6} {'time':>16} {'GFLOP':>6} {'MiB':>5} {'memory':>6} {'off':>8}")
    worst = 0.0
    for name, way in found.items():
        ratios = [a / b for a, b in zip(way.seconds, base.seconds, strict=True)]
        spread = "/".join(f"{f(ratios):.2f}" for f in (min, statistics.median, max))
        off = max(
            float((a - b).norm() / b.norm())
            for a, b in ((way.values, base.values), (way.gradient, base.gradient))
        )
        worst = max(worst, off)
        print(
            f"{name:<10} {statistics.median(way.seconds):>6.2f} {spread:>16} "
            f"{way.flops / 1e9:>6.0f} {way.live:>5.0f} {way.live / base.live:>6.2f} {off:>8.1e}"
        )
    print(f"results {'agree' if worst < EQUAL else 'DISAGREE'} (relative, limit {EQUAL:g})")
    return worst >= EQUAL


if __name__ == "__main__":
    main()
