"""Time and memory of online updates: the common way against mmalign's.

    python benchmarks/online.py --rounds 3

D3PO and TailorPO are timed per update against a plain transcription of the public scripts: images
sampled one by one, prompts encoded anew for every update, chosen and rejected in calls of their
own, a deep copy of the UNet as reference. Both sides draw the same noise, so their losses must
agree. DRaFT-K is timed against DRaFT with the full graph of the sampler and the decoder kept, as K
and T grow.

Every measurement is a fresh process; sides alternate within a round. The model is the one of
`image_dpo.py`, at 128 pixels. Memory is the growth of the peak resident set over what the process
held after imports.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from image_dpo import alternate
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmalign.accelerator import make_accelerator
from mmalign.adapters import load_adapter
from mmalign.config import (
    D3poConfig,
    DraftConfig,
    LoraConfig,
    OnlineConfig,
    RewardConfig,
    SamplingConfig,
    TailorpoConfig,
)
from mmalign.lora import attach_lora
from mmalign.pipelines import d3po, draft, tailorpo
from mmalign.pipelines._online import OnlineRun, PromptBatch
from mmalign.pipelines._training import prepare
from mmalign.report import peak_memory_mib
from mmalign.rewards.brightness import BrightnessReward
from mmalign.rewards.combine import CombinedReward
from mmalign.rollout import differentiable_sample, keyed_noise
from mmalign.types import StepOutput

Update = Callable[[int], float]
PROMPT = "a large red circle left of a small blue star"
SHAPE = (4, 16, 16)
SIZE = {"height": 8 * SHAPE[1], "width": 8 * SHAPE[2]}
STEPS = 4
GUIDANCE = 5.0
BETA = 1.0
EQUAL = 1e-5


class Side(NamedTuple):
    """One way of doing an update: `group` names what is compared, the first side is the measure."""

    group: str
    name: str
    build: Callable[[Path], Update]


def main() -> None:
    """Run the rounds and print a table per group; exit 1 when losses disagree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", help="measure one side, `group/name`, and print JSON")
    parser.add_argument("--model", type=Path, help="folder made by the parent process")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sides = {f"{side.group}/{side.name}": side for side in SIDES}
    if options.side:
        result = measure(sides[options.side], options.model, options.updates)
        sys.stdout.write(json.dumps(result) + "\n")
        return
    flags = ["--updates", str(options.updates), "--threads", str(options.threads)]
    sys.exit(report(alternate(__file__, sides, options.rounds, flags)))


def measure(side: Side, model: Path, updates: int) -> dict[str, Any]:
    """Run updates; the first warms up and the last is counted, not timed."""
    before = peak_memory_mib("cpu")
    update = side.build(model)
    seconds, losses = [], []
    for number in range(updates):
        counted = number == updates - 1
        memory = peak_memory_mib("cpu") - before
        with FlopCounterMode(display=False) if counted else nullcontext() as counter:
            start = time.perf_counter()
            losses.append(update(number))
            if 0 < number < updates - 1:
                seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds),
        "flops": counter.get_total_flops(),
        "memory_mib": memory,
        "losses": losses,
    }


def options_of(kind: type[Any], model: Path, **options: Any) -> Any:
    """Make the options that all sides share."""
    steps = options.pop("num_inference_steps", STEPS)
    return kind(
        model=str(model),
        device="cpu",
        offline=True,
        output_dir=str(model / "run"),
        lora=LoraConfig(rank=8),
        sampling=SamplingConfig(num_inference_steps=steps, guidance_scale=GUIDANCE, **SIZE),
        **options,
    )


def online_run(config: OnlineConfig) -> OnlineRun:
    """Set up a run as the pipelines do; prompts are encoded once."""
    accelerator = make_accelerator(config, cpu=True)
    adapter = load_adapter(config, device=accelerator.device)
    reward = CombinedReward([(BrightnessReward(), RewardConfig(name="brightness"))])
    return OnlineRun(
        config=config,
        run=prepare(config, adapter, accelerator),
        reward=reward,
        rewards=reward.each,
        negative=adapter.encode_condition([""], **SIZE),
        grid=adapter.sampler_grid(config.sampling.num_inference_steps),
    )


def our_update(config: OnlineConfig, make_step: Callable[..., Any], backward: bool) -> Update:
    """Build the library's own update."""
    online = online_run(config)
    step = make_step(config, online)
    condition = online.run.adapter.encode_condition([PROMPT], **SIZE)

    def loss_at(number: int) -> Tensor:
        batch = PromptBatch((PROMPT,), ((0, number, 0, 0),), (PROMPT,), condition)
        output: StepOutput = step(batch)
        if backward:
            output.loss.backward()
        return output.loss

    return optimized(loss_at, online.run.trainable)


def optimized(loss_at: Callable[[int], Tensor], parameters: list[Any]) -> Update:
    """Follow each loss, whose gradients are in place, by an optimizer step."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)

    def update(number: int) -> float:
        loss = loss_at(number)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return update


class Common:
    """The public scripts' way: a pipeline, and a deep copy of its UNet as reference."""

    def __init__(self, model: Path, checkpointing: bool) -> None:
        """Load the pipeline and attach a LoRA."""
        self.pipeline = StableDiffusionPipeline.from_pretrained(model)
        self.scheduler: DDIMScheduler = self.pipeline.scheduler
        self.unet: UNet2DConditionModel = self.pipeline.unet
        for part in (self.pipeline.vae, self.pipeline.text_encoder, self.unet):
            part.requires_grad_(False)
        self.reference = copy.deepcopy(self.unet)
        attach_lora(self.unet, LoraConfig(rank=8), 0)
        if checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.unet.train()
        self.scheduler.set_timesteps(STEPS)

    @torch.no_grad()
    def encode(self) -> Tensor:
        """Encode the empty prompt and the prompt, (2, L, D)."""
        tokenizer = self.pipeline.tokenizer
        tokens = tokenizer(["", PROMPT], padding="max_length", return_tensors="pt").input_ids
        return self.pipeline.text_encoder(tokens)[0]

    def predict(self, unet: UNet2DConditionModel, latents: Tensor, step: int, text: Tensor) -> Any:
        """Predict with guidance."""
        timestep = self.scheduler.timesteps[step]
        free, bound = unet(latents.repeat(2, 1, 1, 1), timestep, text).sample.chunk(2)
        return free + GUIDANCE * (bound - free)

    def move(self, output: Tensor, latents: Tensor, step: int, noise: Tensor) -> Any:
        """Take a DDIM step with eta 1."""
        timestep = self.scheduler.timesteps[step]
        return self.scheduler.step(output, timestep, latents, eta=1.0, variance_noise=noise)

    def log_density(self, output: Tensor, latents: Tensor, after: Tensor, step: int) -> Tensor:
        """Average the log-density of `after` over its elements, (1,)."""
        mean = self.move(output, latents, step, torch.zeros_like(latents)).prev_sample
        timestep = int(self.scheduler.timesteps[step])
        std = self.scheduler._get_variance(timestep, timestep - 1000 // STEPS) ** 0.5
        return torch.distributions.Normal(mean, std).log_prob(after).flatten(1).mean(1)

    @torch.no_grad()
    def reward(self, latents: Tensor) -> Tensor:
        """Score clean latents."""
        vae = self.pipeline.vae
        images = vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5
        return BrightnessReward()(images.clamp(0, 1), [PROMPT])

    def loss(
        self, latents: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], step: int, text: Tensor
    ) -> Tensor:
        """Compare chosen and rejected, policy and reference, each in a call of its own."""
        ratios = []
        for before, drawn in zip(latents, after, strict=True):
            policy = self.log_density(
                self.predict(self.unet, before, step, text), before, drawn, step
            )
            with torch.no_grad():
                output = self.predict(self.reference, before, step, text)
                reference = self.log_density(output, before, drawn, step)
            ratios.append(policy - reference)
        return -F.logsigmoid(BETA * (ratios[0] - ratios[1])).mean()


def draw(number: int, *purpose: Any) -> Tensor:
    """Draw what the library draws."""
    return keyed_noise(SHAPE, [(0, number, 0, 0, *purpose)], torch.device("cpu"))


def common_d3po(model: Path, checkpointing: bool) -> Update:
    """Transcribe D3PO: two trajectories one by one, then every step with four calls."""
    common = Common(model, checkpointing)

    def trajectory(number: int, candidate: int, text: Tensor) -> list[Tensor]:
        found = [draw(number, "start")]
        for step in range(STEPS):
            output = common.predict(common.unet, found[-1], step, text)
            noise = draw(number, "step", step, candidate)
            found.append(common.move(output, found[-1], step, noise).prev_sample)
        return found

    def loss_at(number: int) -> Tensor:
        text = common.encode()
        with torch.no_grad():
            both = [trajectory(number, candidate, text) for candidate in (0, 1)]
        first = common.reward(both[0][-1]) >= common.reward(both[1][-1])
        chosen, rejected = both if bool(first) else both[::-1]
        losses = []
        for step in range(STEPS):
            before, after = (chosen[step], rejected[step]), (chosen[step + 1], rejected[step + 1])
            loss = common.loss(before, after, step, text)
            (loss / STEPS).backward()
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    return optimized(loss_at, [p for p in common.unet.parameters() if p.requires_grad])


def common_tailorpo(model: Path, checkpointing: bool) -> Update:
    """Transcribe TailorPO: both candidates of a step scored and trained in calls of their own."""
    common = Common(model, checkpointing)

    def predicted(latents: Tensor, step: int, text: Tensor) -> Tensor:
        if step == STEPS:
            return latents
        output = common.predict(common.unet, latents, step, text)
        return common.move(output, latents, step, latents).pred_original_sample

    def loss_at(number: int) -> Tensor:
        text, latents = common.encode(), draw(number, "start")
        losses = []
        for step in range(STEPS):
            with torch.no_grad():
                output = common.predict(common.unet, latents, step, text)
                noises = [draw(number, "step", step, candidate) for candidate in (0, 1)]
                moved = [common.move(output, latents, step, n).prev_sample for n in noises]
                scores = [common.reward(predicted(x, step + 1, text)) for x in moved]
            chosen, rejected = moved if bool(scores[0] >= scores[1]) else moved[::-1]
            loss = common.loss((latents, latents), (chosen, rejected), step, text)
            (loss / STEPS).backward()
            losses.append(loss.detach())
            latents = chosen
        return torch.stack(losses).mean()

    return optimized(loss_at, [p for p in common.unet.parameters() if p.requires_grad])


def our_d3po(model: Path, train_steps: int | None = None) -> Update:
    """Build D3PO of the library."""
    config = options_of(D3poConfig, model, beta=BETA, clamp="none", train_steps=train_steps)
    return our_update(config, d3po.make_step, backward=False)


def our_tailorpo(model: Path) -> Update:
    """Build TailorPO of the library, sampling on from the preferred candidate."""
    config = options_of(
        TailorpoConfig,
        model,
        beta=BETA,
        clamp="none",
        train_steps=None,
        continuation="preferred",
    )
    return our_update(config, tailorpo.make_step, backward=False)


def our_draft(model: Path, steps: int, backprop_steps: int) -> Update:
    """Build DRaFT-K of the library: steps checkpointed, the decoder behind a bridge."""
    config = options_of(
        DraftConfig, model, num_inference_steps=steps, backprop_steps=backprop_steps
    )
    return our_update(config, draft.make_step, backward=True)


def full_graph(model: Path, steps: int, backprop_steps: int) -> Update:
    """Keep the whole graph of sampler, decoder and reward."""
    config = options_of(DraftConfig, model, num_inference_steps=steps)

    def make_step(_: DraftConfig, online: OnlineRun) -> Callable[[PromptBatch], StepOutput]:
        def step(batch: PromptBatch) -> StepOutput:
            clean, _ = differentiable_sample(
                online.sampler(batch),
                online.noise(batch, "start"),
                lambda index: online.noise(batch, "step", index),
                backprop_steps=backprop_steps,
                checkpointing=False,
            )
            rewards = online.reward(online.run.adapter.decode(clean), batch.prompts)
            return StepOutput(-rewards.mean(), {})

        return step

    return our_update(config, make_step, backward=True)


SIDES = (
    Side("d3po", "common", lambda model: common_d3po(model, False)),
    Side("d3po", "common, checkpointed", lambda model: common_d3po(model, True)),
    Side("d3po", "mmalign", our_d3po),
    Side("d3po", "mmalign, half the steps", lambda model: our_d3po(model, STEPS // 2)),
    Side("tailorpo", "common", lambda model: common_tailorpo(model, False)),
    Side("tailorpo", "common, checkpointed", lambda model: common_tailorpo(model, True)),
    Side("tailorpo", "mmalign", our_tailorpo),
    *(
        Side(f"draft, T={steps}, K={k}", name, lambda model, f=f, t=steps, k=k: f(model, t, k))
        for steps, k in ((4, 1), (4, 4), (8, 1), (8, 4), (8, 8))
        for name, f in (("full graph", full_graph), ("mmalign", our_draft))
    ),
)


def report(results: dict[str, list[dict[str, Any]]]) -> int:
    """Print medians and ratios to the first side of each group; return 1 when a loss differs."""
    lines = [
        f"{'side':<36} {'s/update':>9} {'x first':>8} {'MiB':>7} {'x first':>8} {'GFLOP':>7} "
        f"{'max loss diff':>14}"
    ]
    worst = 0.0
    for name, runs in results.items():
        group = name.split("/")[0]
        first = next(found for key, found in results.items() if key.split("/")[0] == group)
        cells = []
        for key in ("seconds", "memory_mib"):
            value = statistics.median(run[key] for run in runs)
            ratio = statistics.median(
                run[key] / base[key] for run, base in zip(runs, first, strict=True)
            )
            cells.append((value, ratio))
        (seconds, time_ratio), (memory, memory_ratio) = cells
        difference = max(
            abs(a - b)
            for run, base in zip(runs, first, strict=True)
            for a, b in zip(run["losses"], base["losses"], strict=True)
        )
        if "half" not in name:  # another loss: fewer steps
            worst = max(worst, difference)
        lines.append(
            f"{name:<36} {seconds:>9.2f} {time_ratio:>8.2f} {memory:>7.0f} {memory_ratio:>8.2f} "
            f"{runs[0]['flops'] / 1e9:>7.0f} {difference:>14.1e}"
        )
    lines.append(f"losses {'agree' if worst < EQUAL else 'DISAGREE'} (limit {EQUAL:g})")
    sys.stdout.write("\n".join(lines) + "\n")
    return int(worst >= EQUAL)


if __name__ == "__main__":
    main()
