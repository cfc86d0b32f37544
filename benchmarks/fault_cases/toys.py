"""The models, pairs and commands of the cases: small enough that a run takes a second."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from mmalign.data.writers import write_pairs
from mmalign.types import ImageRef, PreferencePair

from .harness import REPOSITORY

COLORS = ("red", "green", "blue", "white", "black", "gray")
PROMPTS = ("red", "a red", "red red")
STEPS = 10
BRIGHTNESS = '[{"name": "brightness"}]'

OFFLINE = ("diffusion-dpo", "consistency-dpo", "curriculum-dpo", "mapo", "diffusion-kto", "dro")
ONLINE = ("d3po", "tailorpo", "draft", "rocm")
METHODS = (*OFFLINE, "online-dpo", *ONLINE, "vlm-dpo")
CONSISTENCY = ("consistency-dpo", "rocm")


class Toys:
    """Makes each model and each set of pairs once, in one folder, when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`, which may hold them already."""
        self.folder = folder

    @functools.cached_property
    def sd(self) -> Path:
        """A random Stable Diffusion model."""
        return self._made("sd", lambda to: test_models().save_sd(to))

    @functools.cached_property
    def lcm(self) -> Path:
        """A random latent consistency model."""
        return self._made("lcm", save_lcm)

    @functools.cached_property
    def llava(self) -> Path:
        """A random LLaVA model."""
        return self._made("llava", lambda to: test_models().vlm_models.save_llava(to))

    @functools.cached_property
    def pairs(self) -> Path:
        """Six pairs of plain images, two for each prompt, with scores."""
        return self._made("pairs", save_pairs)

    @functools.cached_property
    def vlm_pairs(self) -> Path:
        """Six pairs of answers about three images."""
        return self._made("vlm_pairs", save_vlm_pairs) / "pairs.jsonl"

    @functools.cached_property
    def prompts(self) -> Path:
        """Three prompts."""
        return self._made("prompts", save_prompts) / "prompts.txt"

    def all(self) -> None:
        """Make everything, so that forks share it."""
        for name in ("sd", "lcm", "llava", "pairs", "vlm_pairs", "prompts"):
            getattr(self, name)

    def _made(self, name: str, make: Callable[[Path], object]) -> Path:
        final, temporary = self.folder / name, self.folder / f".{name}"
        if not final.exists():
            temporary.mkdir(parents=True)
            make(temporary)
            os.replace(temporary, final)
        return final

    def train(self, method: str, output: Path | str, *more: str) -> list[str]:
        """Arguments of a short training run; later options win."""
        model = self.lcm if method in CONSISTENCY else self.sd
        argv = [
            *("train", method, "--device=cpu", "--offline", f"--output_dir={output}"),
            *(f"--max_steps={STEPS}", "--save_steps=2", "--resume_from_checkpoint=latest"),
            *("--per_device_train_batch_size=2", "--learning_rate=0.01", "--lora.rank=2"),
            f"--model={self.llava if method == 'vlm-dpo' else model}",
        ]
        return [*argv, *self._own(method), *more]

    def _own(self, method: str) -> list[str]:
        sampling = ["--sampling.num_inference_steps=3", "--sampling.guidance_scale=2"]
        if method == "vlm-dpo":
            return [f"--pairs.path={self.vlm_pairs}"]
        if method == "online-dpo":
            candidates = [
                *(f"--candidates.prompts={self.prompts}", "--candidates.candidates_per_prompt=3"),
                *(f"--candidates.rewards={BRIGHTNESS}", "--candidates.rule=all_pairs"),
                "--candidates.sampling.num_inference_steps=2",
            ]
            rounds = ["--rounds=2", "--beta=10", "--pairs.resolution=16", "--max_steps=4"]
            buckets = ["--curriculum.num_buckets=2", "--curriculum.stage_steps=2"]
            return [*rounds, *buckets, *candidates, *sampling]
        if method in ONLINE:
            return [f"--prompts={self.prompts}", f"--rewards={BRIGHTNESS}", *sampling]
        own = [f"--pairs.path={self.pairs}", "--pairs.resolution=16"]
        if method == "consistency-dpo":
            own.append(f"--teacher={self.sd}")
        if method == "curriculum-dpo":
            own += ["--curriculum.num_buckets=2", "--curriculum.stage_steps=3"]
        return own


TOYS = Toys(Path())


def use_toys(folder: Path) -> None:
    """Keep the models of all cases in `folder`."""
    TOYS.folder = folder


@functools.cache
def test_models() -> ModuleType:
    """Load what the tests build their models with."""
    file = REPOSITORY / "tests" / "conftest.py"
    spec = importlib.util.spec_from_file_location("fault_case_models", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def save_lcm(folder: Path) -> None:
    """Write a random latent consistency model."""
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    models = test_models()
    torch.manual_seed(1)
    tokenizer = models.make_tokenizer()
    LatentConsistencyModelPipeline(
        vae=models.make_vae(),
        text_encoder=models.make_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=models.make_unet(time_cond_proj_dim=32),
        scheduler=LCMScheduler(**models.SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)


def png(color: Any, size: tuple[int, int] = (16, 16)) -> bytes:
    """Encode a plain image."""
    buffer = BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def save_pairs(folder: Path) -> None:
    """Write the pairs of images."""
    rows = [
        PreferencePair(
            pair_id=color,
            prompt=PROMPTS[index % 3],
            chosen=ImageRef(png(color), color),
            rejected=ImageRef(png(COLORS[index - 1], (16, 18)), COLORS[index - 1]),
            score_chosen=1.0 + index,
            score_rejected=0.5,
            margin=0.5 + index,
        )
        for index, color in enumerate(COLORS)
    ]
    write_pairs(rows, folder, "imagefolder")


def save_vlm_pairs(folder: Path) -> None:
    """Write the pairs of answers."""
    rows = []
    for index, color in enumerate(COLORS):
        (folder / f"{color}.png").write_bytes(png(color, (24, 20)))
        rows.append(
            {
                "image": f"{color}.png",
                "prompt": "What is in the picture?",
                "chosen": f"A {color} circle {index}.",
                "rejected": f"No blue square {index}.",
            }
        )
    write_lines(folder / "pairs.jsonl", rows)


def save_prompts(folder: Path) -> None:
    """Write the prompts."""
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def weights(output: Path) -> dict[str, torch.Tensor]:
    """Read a run's adapter."""
    (file,) = (output / "adapter").glob("*.safetensors")
    return load_file(file)


def difference(whole: Path, parts: Path) -> str:
    """Say what differs in bits between two runs; nothing when they are the same."""
    if (whole / "metrics.jsonl").read_bytes() != (parts / "metrics.jsonl").read_bytes():
        return "another metrics.jsonl"
    first, second = weights(whole), weights(parts)
    if first.keys() != second.keys():
        return "other tensors"
    return next((f"another {k}" for k in first if not torch.equal(first[k], second[k])), "")
