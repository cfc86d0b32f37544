"""Rebuild everything trained in Shapes world: `python -m mmalign.pipelines.build_shapes --help`.

Every stage resumes where it was stopped (state in `work`). On two CPU cores it takes about five
hours. Measured quality goes to the model card and to `quality.json`, hashes of all files to
`SHA256SUMS`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, LatentConsistencyModelPipeline, StableDiffusionPipeline
from tqdm.auto import tqdm

from mmalign.options import parse_options
from mmalign.shapes.build.autoencoder import build_autoencoder, refine_decoder
from mmalign.shapes.build.card import write_card
from mmalign.shapes.build.consistency import build_student
from mmalign.shapes.build.measure import parser_accuracy, prompt_following, reward_accuracy
from mmalign.shapes.build.measure_vlm import speech_quality
from mmalign.shapes.build.reward import build_reward, save_reward
from mmalign.shapes.build.text import build_text_encoder
from mmalign.shapes.build.text_to_image import build_generator
from mmalign.shapes.build.tokenizer import build_tokenizer
from mmalign.shapes.build.vlm import build_vlm, save_vlm
from mmalign.shapes.prompts import prompt_set

PROMPTS = {"train": 400, "held_out": 200, "stress": 100}
GENERATOR_SAMPLING = {"num_inference_steps": 20, "guidance_scale": 2.5}
STUDENT_SAMPLING = {"num_inference_steps": 4, "guidance_scale": 2.5}


@dataclass(kw_only=True)
class BuildShapesConfig:
    """Options of the build.

    Attributes:
        output: folder for the finished models.
        work: folder for resumable state.
        part: what to build: `image` (generator, student and reward), `vlm` (captioner) or `all`.
            Measures of the rest are kept.
        seed: seed of all stages.
        threads: CPU threads; the weights depend on it in their last bits.
    """

    output: str = "mmalign/shapes/models"
    work: str = "runs/shapes-build"
    part: Literal["all", "image", "vlm"] = "all"
    seed: int = 0
    threads: int = 2


def run(config: BuildShapesConfig) -> None:
    """Build, save, measure, describe."""
    torch.set_num_threads(config.threads)
    output, work = Path(config.output), Path(config.work)
    work.mkdir(parents=True, exist_ok=True)
    file = output / "quality.json"
    quality = json.loads(file.read_text()) if config.part != "all" and file.exists() else {}
    if config.part != "vlm":
        build_image_models(output, work, config.seed)
        write_prompts(output.parent / "prompts")
        quality |= measure(output, config.seed)
    if config.part != "image":
        save_vlm(*build_vlm(work, config.seed), output / "vlm")
        quality["captioner/held_out"] = speech_quality(output / "vlm", config.seed + 1)
    file.write_text(json.dumps(quality, indent=2) + "\n")
    write_card(output, quality, config.seed, generator=GENERATOR_SAMPLING, student=STUDENT_SAMPLING)
    write_hashes(output)
    tqdm.write(json.dumps(quality, indent=2))


def build_image_models(output: Path, work: Path, seed: int) -> None:
    """Train and save generator, student and reward."""
    tokenizer = build_tokenizer(seed)
    encoder = build_text_encoder(tokenizer, work, seed)
    vae = build_autoencoder(work, seed)
    generator = build_generator(vae, tokenizer, encoder, work, seed)
    refine_decoder(vae, work, seed)
    save_pipeline(generator, output / "sd")
    student = build_student(generator, work, seed)
    save_pipeline(student, output / "lcm")
    reward = build_reward(tokenizer, encoder, generator, work, seed)
    save_reward(reward, tokenizer, output / "clip")


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Save weights in half precision; loading gives float32 unless asked otherwise."""
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    pipeline.to(torch.float32)
    # transformers would otherwise load the text encoder in the precision it is stored in.
    file = folder / "text_encoder" / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "dtype": "float32"}, indent=2) + "\n")


def write_prompts(folder: Path) -> None:
    """Write the prompt sets, one prompt per line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in PROMPTS.items():
        prompts = prompt_set(name, count)  # type: ignore[arg-type]
        (folder / f"{name}.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))


def measure(models: Path, seed: int) -> dict[str, Any]:
    """Measure the saved models as a user would load them."""
    generator = StableDiffusionPipeline.from_pretrained(models / "sd")
    student = LatentConsistencyModelPipeline.from_pretrained(models / "lcm")
    quality: dict[str, Any] = {"parser": parser_accuracy(seed)}
    for name in PROMPTS:
        prompts = prompt_set(name, 200, seed=seed + 1)  # type: ignore[arg-type]
        quality[f"generator/{name}"] = prompt_following(
            generator, prompts, seed=seed, **GENERATOR_SAMPLING
        )
    held_out = prompt_set("held_out", 200, seed=seed + 1)
    quality["student/held_out"] = prompt_following(student, held_out, seed=seed, **STUDENT_SAMPLING)
    quality["reward/held_out"] = reward_accuracy(models / "clip", seed)
    return quality


def write_hashes(models: Path) -> None:
    """Write `SHA256SUMS` over every built file, in the form `sha256sum --check` reads."""
    files = sorted(f for f in models.rglob("*") if f.is_file() and f.name != "SHA256SUMS")
    lines = [
        f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(models)}\n" for f in files
    ]
    (models / "SHA256SUMS").write_text("".join(lines))


if __name__ == "__main__":
    run(parse_options(BuildShapesConfig, sys.argv[1:], command="build-shapes"))
