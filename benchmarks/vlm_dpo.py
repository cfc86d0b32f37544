"""Time and memory of DPO on a vision-language model: TRL's trainer against mmalign's.

    uv run --group bench python benchmarks/vlm_dpo.py --rounds 3

Both trainers get the same LLaVA (random weights, built in a temporary folder), the same pairs in
the same order with the same JPEG files, and the same initial LoRA, so their losses must agree at
every step. The model is small, but its vocabulary and vision tower are too: head, vision tower and
body have about the shares of the work that they have in LLaVA-1.5-7B. TRL's fallback for CPUs
scores every position, where its GPU kernel scores answers alone; with the usual vocabulary that
would flatter mmalign, here it is 2 % of TRL's work.

Sides: `trl default` has gradient checkpointing on, as TRL ships; `trl nogc` is its fastest setting.
`plain` is mmalign with prefixes computed anew for every answer and nothing kept; `online` computes
the reference in every step and the image once per step, as in one epoch; `cached` reads both, as in
any later epoch; `fill` is what filling the caches costs per step, once. `cached gc` adds gradient
checkpointing.

Every measurement is a fresh process; sides alternate within a round. A step is timed from one
update to the next, in processor time, data loading and logging included. Memory is the peak of what
tensors hold above what they held when the step began (`live`), and the growth of the peak resident
set over what the process held after its imports (`rss`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from vlm_fixture import ALPHA, PAIRS, RANK, build, lora_settings

from mmalign.config import VlmDpoConfig, VlmPairsConfig
from mmalign.data.order import batch_indices
from mmalign.pipelines import vlm_dpo
from mmalign.pipelines._vlm_reference import ReferenceScores
from mmalign.report import peak_memory_mib

IMAGE_TOKENS = (576, 144)
BATCH = 2
WARM, TIMED = 1, 3
STEPS = WARM + TIMED + 2
"""One step to warm up, some to time, one to see memory, one to count."""
SETTINGS: dict[str, Any] = {
    "beta": 0.1,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": 1,
    "max_steps": STEPS,
}
"""What both trainers are told, in the same words."""
EQUAL = 1e-4
OURS: dict[str, dict[str, Any]] = {
    "plain": {"share_prefix": False, "cache_reference": False},
    "online": {"cache_reference": False},
    "cached": {},
    "cached gc": {"gradient_checkpointing": True},
}
SIDES = ("trl default", "trl nogc", *OURS)


def main() -> None:
    """Run the rounds and print a table per number of image tokens; exit 1 when losses disagree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--image-tokens", type=int, nargs="+", default=list(IMAGE_TOKENS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--json", type=Path, help="file that rounds are added to")
    parser.add_argument("--side", choices=SIDES, help="measure one side and print JSON")
    parser.add_argument("--model", type=Path, help="folder made by the parent process")
    options = parser.parse_args()
    if options.side:
        torch.set_num_threads(options.threads)
        sys.stdout.write(json.dumps(measure(options.side, options.model)) + "\n")
        return
    worst = 0
    for tokens in options.image_tokens:
        rounds = stored(options.json, tokens)
        for found in alternate(options, tokens):
            rounds.append(found)
            store(options.json, tokens, rounds)
        worst = max(worst, report(tokens, rounds))
    sys.exit(worst)


def alternate(options: argparse.Namespace, tokens: int) -> Iterator[dict[str, Any]]:
    """Measure every side in a process of its own, one after the other; yields rounds."""
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), tokens)
        for _ in range(options.rounds):
            found = {}
            for side in options.sides:
                command = [sys.executable, __file__, "--side", side, "--model", folder]
                command += ["--threads", str(options.threads)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found[side] = json.loads(done.stdout.splitlines()[-1])
            yield found


def stored(file: Path | None, tokens: int) -> list[dict[str, Any]]:
    """Read the rounds measured before."""
    if file is None or not file.exists():
        return []
    rounds: list[dict[str, Any]] = json.loads(file.read_text()).get(str(tokens), [])
    return rounds


def store(file: Path | None, tokens: int, rounds: Sequence[dict[str, Any]]) -> None:
    """Write the rounds, beside those with other numbers of image tokens."""
    if file is not None:
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**known, str(tokens): rounds}, indent=1) + "\n")


@dataclass
class Watch:
    """Measures a training run from one optimizer step to the next, whoever runs it.

    Attributes:
        wall: seconds of each timed step.
        cpu: seconds of processor time of each.
        live: bytes of tensors at the peak of a step, above those at its beginning.
        flops: counted in a step.
        rss: peak resident set in MiB, before memory is profiled.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    live: int = 0
    flops: int = 0
    rss: float = 0.0
    _done: int = 0
    _last: tuple[float, float] = (0.0, 0.0)
    _profile: Any = None
    _counter: Any = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch every optimizer inside the block."""
        handle = register_optimizer_step_post_hook(self._stepped)
        try:
            yield
        finally:
            handle.remove()

    def _stepped(self, *_: Any) -> None:
        now = time.perf_counter(), time.process_time()
        self._done += 1
        if WARM < self._done <= WARM + TIMED:
            self.wall.append(now[0] - self._last[0])
            self.cpu.append(now[1] - self._last[1])
        if self._done == WARM + TIMED:
            self.rss = peak_memory_mib("cpu")
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.start()
        elif self._done == WARM + TIMED + 1:
            self._profile.stop()
            self.live = peak_of(self._profile)
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()
        elif self._done == STEPS:
            self._counter.__exit__(None, None, None)
            self.flops = self._counter.get_total_flops()
        self._last = time.perf_counter(), time.process_time()


def peak_of(profiled: Any) -> int:
    """Add up what was allocated and freed, and return the peak in bytes."""
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure(side: str, folder: Path) -> dict[str, Any]:
    """Train some steps."""
    imported = peak_memory_mib("cpu")
    watch = Watch()
    with watch.running(), tempfile.TemporaryDirectory() as output:
        fill = 0.0
        if side in OURS:
            losses, fill = run_ours(folder, Path(output), OURS[side])
        else:
            losses = run_trl(folder, Path(output), checkpointing=side == "trl default")
    return {
        "wall": statistics.median(watch.wall),
        "cpu": statistics.median(watch.cpu),
        "fill": fill / STEPS,
        "rss_mib": watch.rss - imported,
        "live_mib": watch.live / 2**20,
        "flops": watch.flops,
        "losses": losses,
    }


def run_ours(folder: Path, output: Path, options: dict[str, Any]) -> tuple[list[float], float]:
    """Run `mmalign train vlm-dpo`; returns the losses, and seconds spent to fill the caches."""
    config = VlmDpoConfig(
        model=str(folder / "model"),
        pairs=VlmPairsConfig(path=str(folder / "pairs.jsonl")),
        output_dir=str(output),
        device="cpu",
        offline=True,
        lora=lora_settings(),
        logging_steps=1,
        save_steps=0,
        **SETTINGS,
        **options,
    )
    spent, fill = 0.0, ReferenceScores.fill

    def timed(self: ReferenceScores, *args: Any) -> None:
        nonlocal spent
        spent -= time.process_time()
        fill(self, *args)
        spent += time.process_time()

    with patch.object(ReferenceScores, "fill", timed):
        vlm_dpo.run(config)
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines], spent


def run_trl(folder: Path, output: Path, *, checkpointing: bool) -> list[float]:
    """Run TRL's DPOTrainer on the pairs in mmalign's order; returns the losses."""
    import peft
    import trl
    from datasets import Dataset, List
    from datasets import Image as ImageFeature
    from peft.utils import set_peft_model_state_dict

    losses: list[float] = []

    class Recording(trl.DPOTrainer):  # type: ignore[misc, unused-ignore]
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    order = [
        index
        for number in range(STEPS)
        for index in batch_indices(number, size=PAIRS, batch_size=BATCH, seed=0)
    ]
    data = Dataset.from_list([conversation(folder, rows[index]) for index in order])
    trainer = Recording(
        model=str(folder / "model"),
        args=trl.DPOConfig(
            output_dir=str(output),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=checkpointing,
            **SETTINGS,
            max_length=None,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=data.cast_column("images", List(ImageFeature())),
        peft_config=peft.LoraConfig(
            r=RANK,
            lora_alpha=int(ALPHA),
            target_modules=rf".*language_model.*\.({'|'.join(lora_settings().targets)})",
        ),
    )
    set_peft_model_state_dict(trainer.model, load_file(folder / "lora/adapter_model.safetensors"))
    trainer.train()
    return losses


def conversation(folder: Path, row: dict[str, str]) -> dict[str, Any]:
    """Write a pair in TRL's layout."""
    return {
        "images": [str(folder / row["image"])],
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }


def report(tokens: int, rounds: Sequence[dict[str, Any]]) -> int:
    """Print ratios to both settings of TRL, min/median/max over rounds; 1 when a loss differs."""
    lines = [
        f"{tokens} image tokens, {len(rounds)} rounds",
        f"{'side':<14} {'s/step':>7} {'fill':>6} {'GFLOP':>6} {'time / default':>16} "
        f"{'time / nogc':>16} {'MiB live':>9} {'/ default':>10} {'/ nogc':>8} "
        f"{'MiB rss':>8} {'/ nogc':>8} {'loss diff':>10}",
    ]
    worst = 0.0
    for side in rounds[0]:
        runs = [found[side] for found in rounds]
        difference = max(
            abs(a - b)
            for found in rounds
            for a, b in zip(found[side]["losses"], found["trl nogc"]["losses"], strict=True)
        )
        worst = max(worst, difference)
        middle = {
            key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "losses"
        }
        lines.append(
            f"{side:<14} {middle['cpu']:>7.2f} {middle['fill']:>6.2f} "
            f"{middle['flops'] / 1e9:>6.0f} "
            f"{spread(rounds, side, 'trl default', 'cpu'):>16} "
            f"{spread(rounds, side, 'trl nogc', 'cpu'):>16} "
            f"{middle['live_mib']:>9.0f} {spread(rounds, side, 'trl default', 'live_mib', 1):>10} "
            f"{spread(rounds, side, 'trl nogc', 'live_mib', 1):>8} {middle['rss_mib']:>8.0f} "
            f"{spread(rounds, side, 'trl nogc', 'rss_mib', 1):>8} {difference:>10.1e}"
        )
    lines.append(f"losses {'agree' if worst < EQUAL else 'DISAGREE'} (limit {EQUAL:g})")
    sys.stdout.write("\n".join(lines) + "\n")
    return int(worst >= EQUAL)


def spread(rounds: Sequence[dict[str, Any]], side: str, base: str, key: str, parts: int = 3) -> str:
    """Write min/median/max of a ratio over rounds, or the median alone."""
    if base not in rounds[0]:
        return "-"
    ratios = [found[side][key] / found[base][key] for found in rounds]
    middle = statistics.median(ratios)
    shown = [min(ratios), middle, max(ratios)] if parts == 3 else [middle]
    return "/".join(f"{ratio:.2f}" for ratio in shown)


if __name__ == "__main__":
    main()
