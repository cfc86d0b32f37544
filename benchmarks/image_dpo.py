"""Time and memory of Diffusion-DPO steps: the common way against mmalign's.

    python benchmarks/image_dpo.py --rounds 3 --steps 6

The common way is what the public scripts do: every step decodes the images, runs the VAE and the
text encoder, and asks a second, frozen UNet for the reference. All sides see the same images,
latent samples, noise and timesteps, so their losses must agree. The UNet has the layout of Stable
Diffusion 1.5 with narrower blocks, and the autoencoder costs 1.26 UNet forwards per image (1.39 in
Stable Diffusion 1.5).

Denoising errors are about 1 here, float32 rounds them by about 1e-7, and a loss multiplies that by
beta / 2. So beta is 100: under the limit on losses, errors agree to 2e-7. At the usual 5000 the
rounding alone would show as 3e-4.

Every measurement is a fresh process; sides alternate within a round. Memory is the growth of the
peak resident set over what the process held after imports, so Python and libraries do not count.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import skimage.data
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from mmalign.accelerator import make_accelerator
from mmalign.adapters import load_adapter
from mmalign.config import DiffusionDpoConfig, LoraConfig, PairsConfig
from mmalign.data.batch import PairBatch, PairCollator
from mmalign.data.cache import EncodedPair, precompute
from mmalign.data.images import open_image, to_tensor
from mmalign.lora import attach_lora
from mmalign.pipelines import diffusion_dpo
from mmalign.pipelines._training import prepare
from mmalign.report import peak_memory_mib
from mmalign.shapes.build.tokenizer import build_tokenizer
from mmalign.types import Condition, ImageRef, PreferencePair

Step = Callable[[int], torch.Tensor]
PIXELS = 256
PAIRS = 2
SIDES = ("common", "cached", "cached+split", "draws", "draws+split")
DRAWS = 1
EQUAL = 1e-5


def main() -> None:
    """Run the rounds and print the table; exit 1 when losses disagree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help="measure one side and print JSON")
    parser.add_argument("--model", type=Path, help="folder made by the parent process")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.side:
        sys.stdout.write(json.dumps(measure(options.side, options.model, options.steps)) + "\n")
        return
    flags = ["--steps", str(options.steps), "--threads", str(options.threads)]
    sys.exit(report(alternate(__file__, SIDES, options.rounds, flags)))


def alternate(
    script: str, sides: Iterable[str], rounds: int, flags: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Measure every side in a process of its own, one after the other, `rounds` times."""
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        build_model(Path(folder))
        for side in list(results) * rounds:
            command = [sys.executable, script, "--side", side, "--model", folder, *flags]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results[side].append(json.loads(done.stdout.splitlines()[-1]))
    return results


def measure(side: str, model: Path, steps: int) -> dict[str, Any]:
    """Train `steps` steps; the first is counted, not timed."""
    imported = peak_memory_mib("cpu")
    config = replace(
        settings(model),
        num_draws=DRAWS if "draws" in side else 0,
        split_pair_backward="split" in side,
    )
    timed = train((common_step if side == "common" else our_step)(config), steps)
    memory = peak_memory_mib("cpu") - imported
    losses = {"fixed" if config.num_draws else "fresh": timed.pop("losses")}
    if side == "common":  # again, so that there is a loss to compare with under either kind of draw
        fixed = replace(config, num_draws=DRAWS)
        losses["fixed"] = train(common_step(fixed), steps)["losses"]
    return {**timed, "memory_mib": memory, "losses": losses, "matmul_flops": matmul_peak()}


def train(built: tuple[Step, list[torch.nn.Parameter]], steps: int) -> dict[str, Any]:
    """Take optimizer steps and time them."""
    step, parameters = built
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    seconds, losses = [], []
    for number in range(steps):
        with FlopCounterMode(display=False) if number == steps - 1 else nullcontext() as counter:
            start = time.perf_counter()
            loss = step(number)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if 0 < number < steps - 1:
                seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    flops = counter.get_total_flops()
    return {"seconds": statistics.median(seconds), "flops": flops, "losses": losses}


def our_step(config: DiffusionDpoConfig) -> tuple[Step, list[torch.nn.Parameter]]:
    """Build the library's own step, as its pipeline does: encode once, train from the cache."""
    accelerator = make_accelerator(config, cpu=True)
    adapter = load_adapter(config, device=accelerator.device)
    with tempfile.TemporaryDirectory() as folder:
        data = precompute(photographs(), adapter, config.pairs, Path(folder))
        items = [data[index] for index in range(PAIRS)]
        empty = data.empty_condition
    adapter.release_encoders()
    run = prepare(config, adapter, accelerator)
    step = diffusion_dpo.make_step(config, run)
    collate = collator(config, empty)
    return lambda number: step(collate([(number, item) for item in items])).loss, run.trainable


def common_step(config: DiffusionDpoConfig) -> tuple[Step, list[torch.nn.Parameter]]:
    """Transcribe the public LoRA scripts: VAE and text encoder every step, a second UNet."""
    pipeline = StableDiffusionPipeline.from_pretrained(config.model)
    vae, unet = pipeline.vae.requires_grad_(False), pipeline.unet
    encoder = pipeline.text_encoder.requires_grad_(False)
    reference = UNet2DConditionModel.from_pretrained(config.model, subfolder="unet")
    reference.requires_grad_(False)
    attach_lora(unet, config.lora, config.seed)
    pairs, scale = photographs(), vae.config.scaling_factor
    prompts = [pair.prompt for pair in pairs]

    def step(number: int) -> torch.Tensor:
        sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        images = [open_image(side, max_pixels=config.pairs.max_pixels) for side in sides]
        pixels = torch.stack([to_tensor(image, PIXELS) for image in images]) * 2 - 1
        tokens = pipeline.tokenizer(
            prompts, padding="max_length", truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            posterior = vae.encode(pixels).latent_dist
            text = encoder(tokens.input_ids)[0].repeat(2, 1, 1)
        draws = draw(config, number, [pair.pair_id for pair in pairs], posterior.mean.shape[1:])
        latents = (posterior.mean + posterior.std * draws.latents) * scale
        noisy = pipeline.scheduler.add_noise(latents, draws.noise, draws.timesteps)
        prediction = unet(noisy, draws.timesteps, text).sample
        with torch.no_grad():
            ref_prediction = reference(noisy, draws.timesteps, text).sample
        error, ref_error = (
            F.mse_loss(output, draws.noise, reduction="none").mean((1, 2, 3))
            for output in (prediction, ref_prediction)
        )
        chosen, rejected = (error - ref_error).chunk(2)
        return -F.logsigmoid(-0.5 * config.beta * (chosen - rejected)).mean()

    return step, [p for p in unet.parameters() if p.requires_grad]


def draw(config: DiffusionDpoConfig, number: int, ids: list[str], shape: torch.Size) -> PairBatch:
    """Make the library's draws; its latents then are the standard normal sample of each side."""
    zeros, ones = torch.zeros(1, *shape), torch.ones(1, *shape)
    items = [
        EncodedPair(
            pair_id=name,
            prompt="",
            chosen_mean=zeros,
            chosen_std=ones,
            rejected_mean=zeros,
            rejected_std=ones,
            condition={},
            margin=None,
        )
        for name in ids
    ]
    return collator(config, {})([(number, item) for item in items])


def collator(config: DiffusionDpoConfig, empty: Condition) -> PairCollator:
    """Make the collator that both sides draw with."""
    return PairCollator(
        seed=config.seed, timesteps=range(1000), empty_condition=empty, num_draws=config.num_draws
    )


def settings(model: Path) -> DiffusionDpoConfig:
    """Make the options of every side."""
    return DiffusionDpoConfig(
        model=str(model),
        device="cpu",
        offline=True,
        output_dir=str(model / "run"),
        pairs=PairsConfig(resolution=PIXELS),
        lora=LoraConfig(rank=8),
        beta=100.0,
    )


def photographs() -> list[PreferencePair]:
    """Cut pairs out of real photographs."""
    pairs = []
    for name in ("astronaut", "coffee", "chelsea", "rocket")[:PAIRS]:
        picture = (
            Image.fromarray(getattr(skimage.data, name)()).convert("RGB").crop((0, 0, 300, 300))
        )
        sides = []
        for turned in (picture, picture.rotate(90)):
            buffer = io.BytesIO()
            turned.save(buffer, "JPEG", quality=90)
            sides.append(ImageRef(buffer.getvalue(), name))
        pairs.append(
            PreferencePair(
                pair_id=name, prompt=f"a photo, {name}", chosen=sides[0], rejected=sides[1]
            )
        )
    return pairs


def build_model(folder: Path) -> None:
    """Save a random Stable Diffusion of SD 1.5's layout with narrower blocks."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(0, captions=500)
    width = 192
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            sample_size=PIXELS,
            latent_channels=4,
            block_out_channels=(36, 72, 144, 144),
            norm_num_groups=12,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=12,
                num_attention_heads=4,
                max_position_embeddings=tokenizer.model_max_length,
                eos_token_id=tokenizer.eos_token_id,
            )
        ),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=PIXELS // 8,
            block_out_channels=(96, 192, 384, 384),
            cross_attention_dim=width,
            attention_head_dim=8,
        ),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)


def matmul_peak() -> float:
    """Measure float32 matrix products, in FLOP/s."""
    size = 2048
    a, b = torch.randn(size, size), torch.randn(size, size)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def report(results: dict[str, list[dict[str, Any]]]) -> int:
    """Print medians and ratios; return 1 when a loss differs."""
    lines = [
        f"{'side':<14} {'s/step':>8} {'x common':>9} {'MiB':>7} {'x common':>9} "
        f"{'GFLOP':>7} {'of peak':>8} {'max loss diff':>14}"
    ]
    worst = 0.0
    common = results["common"]
    for side, runs in results.items():
        kind = "fixed" if "draws" in side else "fresh"
        difference = max(
            abs(a - b)
            for run, base in zip(runs, common, strict=True)
            for a, b in zip(run["losses"][kind], base["losses"][kind], strict=True)
        )
        worst = max(worst, difference)
        seconds, memory = (
            statistics.median(run[key] for run in runs) for key in ("seconds", "memory_mib")
        )
        time_ratio, memory_ratio = (
            statistics.median(run[key] / base[key] for run, base in zip(runs, common, strict=True))
            for key in ("seconds", "memory_mib")
        )
        flops = runs[0]["flops"]
        share = flops / seconds / max(run["matmul_flops"] for run in runs)
        lines.append(
            f"{side:<14} {seconds:>8.2f} {time_ratio:>9.2f} {memory:>7.0f} {memory_ratio:>9.2f} "
            f"{flops / 1e9:>7.0f} {share:>8.0%} {difference:>14.1e}"
        )
    lines.append(f"losses {'agree' if worst < EQUAL else 'DISAGREE'} (limit {EQUAL:g})")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if worst < EQUAL else 1


if __name__ == "__main__":
    main()
