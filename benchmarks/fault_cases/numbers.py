"""Row 6, one process: NaN and infinity, wherever they come from."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .harness import Said, Tally, case, mmalign
from .toys import TOYS, difference, weights

STOPS = "stops in one line that names the step or sample; saved weights are finite"


def finite(output: Path) -> str:
    """Say which saved tensor is not finite; nothing when all are."""
    from mmalign.checkpoint import list_checkpoints, load_checkpoint

    for path in list_checkpoints(output / "checkpoints"):
        for name, value in load_checkpoint(path).tensors["model"].items():
            if not torch.isfinite(value).all():
                return f"{path.name} {name} is not finite"
    return ""


def stops(said: Said, output: Path, tally: Tally, *words: str) -> None:
    """Count the refusal and the weights that were kept."""
    tally.refused(said, *words)
    problem = finite(output)
    tally.point(not problem, problem)


def spoilt(folder: Path, component: str) -> Path:
    """Copy the model with NaN in all weights of a component."""
    model = folder / f"nan-{component}"
    shutil.copytree(TOYS.sd, model)
    (file,) = (model / component).glob("*.safetensors")
    tensors = {name: torch.full_like(value, torch.nan) for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return model


@case(6, "learning rates of 1e5 to 1e38", STOPS, limit=300)
def huge_step(folder: Path, tally: Tally) -> None:
    """Step out of the numbers there are: in the loss, in the weights, in the update itself."""
    for method in ("diffusion-dpo", "d3po", "vlm-dpo"):
        for rate in ("1e5", "1e20", "3e37", "1e38"):
            output = folder / method / rate
            argv = TOYS.train(method, output, f"--learning_rate={rate}", "--save_steps=1")
            said = mmalign(*argv)
            problem = finite(output)
            tally.point(not problem, f"{method} at {rate}: {problem}")
            if said.code or rate != "1e5":  # which some models survive
                tally.refused(said, "step ", "last good weights")


def inject(what: str, steps: tuple[int, ...]) -> None:
    """Make the loss, or one gradient, of some steps NaN or infinite, in this process."""
    from mmalign import accumulation, trainer
    from mmalign.types import StepOutput

    original, calls = accumulation.accumulate, [0]

    def broken(
        step: Callable[[Any], StepOutput], batches: Iterator[Any], **options: Any
    ) -> accumulation.Measured:
        calls[0] += 1
        if calls[0] not in steps:
            return original(step, batches, **options)
        if what == "loss":

            def spoilt(batch: Any) -> StepOutput:
                output = step(batch)
                return output._replace(loss=output.loss * torch.nan)

            return original(spoilt, batches, **options)
        last = [p for p in options["module"].parameters() if p.requires_grad][-1]
        hook = last.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
        try:
            return original(step, batches, **options)
        finally:
            hook.remove()

    trainer.accumulate = broken


@case(6, "NaN loss in one step, on_nan: stop", STOPS)
def nan_loss(folder: Path, tally: Tally) -> None:
    """Stop, name the pair, keep the step before."""
    output = folder / "run"
    said = mmalign(*TOYS.train("mapo", output), before=partial(inject, "loss", (4,)))
    stops(said, output, tally, "step 4: loss nan", "in pairs ", "checkpoint-3")


@case(6, "infinite gradient in one step, on_nan: stop", STOPS)
def inf_gradient(folder: Path, tally: Tally) -> None:
    """The same with a finite loss."""
    output = folder / "run"
    said = mmalign(*TOYS.train("mapo", output), before=partial(inject, "gradient", (4,)))
    stops(said, output, tally, "step 4: loss", "gradient norm ", "in pairs ", "checkpoint-3")


@case(6, "NaN in two steps, on_nan: skip", "skipped and counted; resumed run goes on; finite")
def nan_skipped(folder: Path, tally: Tally) -> None:
    """Skip, log, count, and be done."""
    for what in ("loss", "gradient"):
        output = folder / what
        argv = TOYS.train("mapo", output, "--on_nan=skip")
        said = mmalign(*argv, before=partial(inject, what, (3, 4)))
        lines = (output / "metrics.jsonl").read_text().splitlines()
        marked = sum('"skipped": 1.0' in line for line in lines)
        ok = said.code == 0 and marked == 2 and "skipped, 2 so far" in said.text
        tally.point(ok, f"code {said.code}, {marked} steps marked")
        bad = [n for n, v in weights(output).items() if not torch.isfinite(v).all()]
        tally.point(not bad, f"not finite: {bad}")


@case(6, "NaN for ever, on_nan: skip", STOPS)
def nan_for_ever(folder: Path, tally: Tally) -> None:
    """A run that only skips ends."""
    output = folder / "run"
    argv = TOYS.train("mapo", output, "--on_nan=skip", "--max_steps=60")
    said = mmalign(*argv, before=partial(inject, "loss", tuple(range(4, 100))))
    stops(said, output, tally, "25 before it skipped", "checkpoint-")


@case(6, "reward of NaN, infinity and None", STOPS)
def bad_rewards(folder: Path, tally: Tally) -> None:
    """A reward goes wrong on the way."""
    for name, said in (("nan", "returned nan"), ("infinite", "returned inf"), ("none", "None")):
        output = folder / name
        rewards = f'--rewards=[{{"name": "fault_cases.rewards:{name}"}}]'
        answer = mmalign(*TOYS.train("d3po", output, rewards))
        stops(answer, output, tally, said, "prompt", "last good weights")


@case(6, "gradient of a reward", STOPS)
def bad_reward_gradient(folder: Path, tally: Tally) -> None:
    """A reward is finite, its gradient is not."""
    options = '{"function": "fault_cases.rewards:nan_gradient", "differentiable": true}'
    for method in ("draft", "rocm"):
        rewards = f'--rewards=[{{"name": "callable", "options": {options}}}]'
        argv = TOYS.train(method, folder / method, rewards)
        stops(mmalign(*argv), folder / method, tally, "step 1: loss nan")


@case(6, "VAE, text encoder and UNet of NaN", STOPS)
def nan_model(folder: Path, tally: Tally) -> None:
    """A model's weights are NaN, offline and online."""
    for component in ("vae", "text_encoder", "unet"):
        model = spoilt(folder, component)
        for method in ("mapo", "diffusion-dpo", "d3po", "draft"):
            output = folder / component / method
            said = mmalign(*TOYS.train(method, output, f"--model={model}"))
            stops(said, output, tally)
    generate = ["generate", f"--model={spoilt(folder / 'g', 'vae')}", "--prompt=red"]
    said = mmalign(*generate, "--device=cpu", f"--output={folder / 'out'}")
    tally.refused(said, "not finite")


@case(6, "adapter of NaN", "refused, or said where the images are not finite")
def nan_adapter(folder: Path, tally: Tally) -> None:
    """An adapter that somebody else made is full of NaN."""
    output = folder / "run"
    mmalign(*TOYS.train("mapo", output, "--max_steps=2"))
    (file,) = (output / "adapter").glob("*.safetensors")
    from safetensors import safe_open

    with safe_open(file, framework="pt") as content:
        metadata = content.metadata()
    tensors = {name: torch.full_like(value, torch.nan) for name, value in load_file(file).items()}
    save_file(tensors, file, metadata=metadata)
    argv = ["generate", f"--model={TOYS.sd}", f"--adapter={file}", "--prompt=red", "--device=cpu"]
    tally.refused(mmalign(*argv, f"--output={folder / 'out'}"), "not finite")


@case(6, "resume after a stop", "bitwise the undisturbed end once the cause is gone")
def resume_after_nan(folder: Path, tally: Tally) -> None:
    """The run goes on as if nothing had been."""
    whole, output = folder / "whole", folder / "run"
    mmalign(*TOYS.train("mapo", whole))
    mmalign(*TOYS.train("mapo", output), before=partial(inject, "loss", (4,)))
    said = mmalign(*TOYS.train("mapo", output))
    problem = said.error if said.code else difference(whole, output)
    tally.point(not problem, problem)
    tally.answers.append("same bits")
