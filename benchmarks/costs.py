"""What an update of every method costs, in forwards of the denoiser.

    python benchmarks/costs.py

Runs one optimizer step of one pair, prompt or image with each method's official hyper-parameters
(the packaged configurations for SD 1.5, SDXL and LCM), on the small models of Shapes world, and
prints what the cost meter counted. Rows through the denoiser do not depend on its size, so the
counts are those of the large models; what a backward costs beside a forward is counted on the UNet
of SD 1.5, without weights.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from mmalign.config import ATTENTION_TARGETS

SHAPES = "pkg://mmalign.shapes/models"
REWARDS = [{"name": "clip", "options": {"model": f"{SHAPES}/clip"}}]
COMMON: dict[str, Any] = {
    "device": "cpu",
    "variant": None,
    "mixed_precision": "no",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "channels_last": False,
    "lora.rank": 4,
}


class Row(NamedTuple):
    """A method with a packaged configuration and the options that make a variant of it."""

    label: str
    train: str
    config: str
    unit: str = "pair"
    options: dict[str, Any] = {}  # noqa: RUF012


ROWS = (
    Row("Diffusion-DPO", "diffusion-dpo", "sd15_diffusion_dpo"),
    Row(
        "Diffusion-DPO, cached reference errors",
        "diffusion-dpo",
        "sd15_diffusion_dpo",
        options={"num_draws": 1, "pairs.limit": 1},
    ),
    Row("Curriculum DPO", "curriculum-dpo", "sd15_curriculum_dpo"),
    Row("MaPO", "mapo", "sdxl_mapo"),
    Row("Diffusion-KTO", "diffusion-kto", "sd15_diffusion_kto", "pair of samples"),
    Row("DRO", "dro", "sd15_dro", "pair of samples"),
    Row("Consistency DPO", "consistency-dpo", "lcm_consistency_dpo"),
    Row("D3PO", "d3po", "sd15_d3po", "pair"),
    Row("D3PO, 5 steps trained", "d3po", "sd15_d3po", "pair", {"train_steps": 5}),
    Row("TailorPO", "tailorpo", "sd15_tailorpo", "trajectory"),
    Row("TailorPO-G", "tailorpo", "sd15_tailorpo", "trajectory", {"guidance_step_size": 0.1}),
    Row("DRaFT", "draft", "sd15_draft", "image", {"backprop_steps": 50}),
    Row("DRaFT-1", "draft", "sd15_draft", "image"),
    Row("DRaFT-LV, n = 2", "draft", "sd15_draft", "image", {"num_lv_samples": 2}),
    Row("ROCM", "rocm", "lcm_rocm", "image"),
)


def main() -> None:
    """Run every row and print the table."""
    backward = backward_share()
    lines = [
        "| method | per | forwards | backwards | reward queries | in forwards |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_pairs(folder)
        for row in ROWS:
            lines.append(cells(row, step_cost(row, folder), backward))
            sys.stderr.write(lines[-1] + "\n")
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.write(f"a backward with LoRA counts as {backward:.2f} forwards\n")


def mmalign(*arguments: str) -> None:
    """Run a command without evaluation images or downloads."""
    command = [sys.executable, "-m", "mmalign", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def flags(options: dict[str, Any]) -> list[str]:
    """Write options as flags."""
    return [
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in options.items()
    ]


def build_pairs(folder: Path) -> None:
    """Make a few pairs to train the offline methods on."""
    prompts = folder / "prompts.txt"
    prompts.write_text("a red circle\na blue star\na green square\n")
    options = {
        "model": f"{SHAPES}/sd",
        "prompts": str(prompts),
        "rewards": REWARDS,
        "rule": "all_pairs",
    }
    sampling = {"sampling.num_inference_steps": 4, "sampling.guidance_scale": 1.0}
    mmalign("pairs", "build", *flags({**options, **sampling, "output": str(folder / "pairs")}))


def step_cost(row: Row, folder: Path) -> dict[str, float]:
    """Count one step of a row; of cached reference errors the second, which finds them there."""
    cost = train(row, folder, steps=1)
    if "num_draws" in row.options:
        both = train(row, folder, steps=2)
        cost = {name: both[name] - value for name, value in cost.items()}
    return cost


def train(row: Row, folder: Path, steps: int) -> dict[str, float]:
    """Do so many steps of a row and read what they cost."""
    family = "lcm" if row.config.startswith("lcm") else "sd"
    output = folder / f"{row.label.replace(' ', '-')}-{steps}"
    options = {**COMMON, "model": f"{SHAPES}/{family}", "output_dir": str(output)}
    if row.train in ("d3po", "tailorpo", "draft", "rocm"):
        options |= {"prompts": str(folder / "prompts.txt"), "rewards": REWARDS}
    else:
        options |= {"pairs.path": str(folder / "pairs"), "pairs.resolution": 64}
    if row.train == "consistency-dpo":
        options["teacher"] = f"{SHAPES}/sd"
    options |= {**row.options, "max_steps": steps}
    mmalign("train", row.train, "--config", row.config, *flags(options))
    return json.loads((output / "summary.json").read_text())["cost"]


def cells(row: Row, cost: dict[str, float], backward: float) -> str:
    """Lay a row out as Markdown."""
    forwards, backwards = cost["unet_forwards"], cost["unet_backwards"]
    counts = f"{forwards:g} | {backwards:g} | {cost['reward_queries']:g}"
    return f"| {row.label} | {row.unit} | {counts} | {forwards + backward * backwards:.0f} |"


def backward_share() -> float:
    """Count the FLOPs of a backward through SD 1.5's UNet with a LoRA, over those of a forward."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=4, target_modules=list(ATTENTION_TARGETS)))
        inputs = (torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 77, 768))
    with FlopCounterMode(display=False) as forward:
        output = unet(*inputs).sample
    with FlopCounterMode(display=False) as back:
        output.sum().backward()
    return back.get_total_flops() / forward.get_total_flops()


if __name__ == "__main__":
    main()
