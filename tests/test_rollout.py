"""Step-by-step sampling against plain diffusers, and gradients through it."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn
from torch.testing import assert_close

from mmalign.adapters import load_adapter
from mmalign.config import ModelConfig
from mmalign.diffusion import SamplerGrid, Transition, ddim_transition
from mmalign.objectives.draft import draft_loss, noised_again
from mmalign.rollout import Sampler, differentiable_sample, keyed_noise, roll_out
from mmalign.types import InputError

PROMPTS = ["red cat", "a dog"]
PIPELINES = {
    "tiny_sd": StableDiffusionPipeline,
    "tiny_sd_v": StableDiffusionPipeline,
    "tiny_sdxl": StableDiffusionXLPipeline,
    "tiny_lcm": LatentConsistencyModelPipeline,
}


def load(folder: Path) -> Any:
    return load_adapter(ModelConfig(model=str(folder)), device="cpu")


def make_sampler(adapter: Any, steps: int, *, guidance: float = 3.5, eta: float = 1.0) -> Sampler:
    size = {"height": 16, "width": 24}
    return Sampler(
        adapter=adapter,
        condition=adapter.encode_condition(PROMPTS, **size),
        negative=adapter.encode_condition([""], **size),
        grid=adapter.sampler_grid(steps),
        guidance_scale=guidance,
        eta=eta,
    )


def generator_noise(shape: tuple[int, ...]) -> Any:
    """Draw as diffusers does, from one generator per image."""
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    return lambda _: torch.cat([torch.randn((1, *shape), generator=g) for g in generators])


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_equals_the_plain_pipeline(
    name: str, eta: float, guidance: float, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    adapter = load(folder)
    sampler = make_sampler(adapter, 4, guidance=guidance, eta=eta)
    noise = generator_noise(adapter.latent_shape(16, 24))
    trajectory = roll_out(sampler, noise(-1), noise)
    assert len(trajectory.latents) == 5
    pipeline = PIPELINES[name].from_pretrained(folder, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    want = pipeline(
        PROMPTS,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        num_inference_steps=4,
        guidance_scale=guidance,
        height=16,
        width=24,
        output_type="latent",
        **({} if name == "tiny_lcm" else {"eta": eta}),
    ).images
    assert_close(trajectory.latents[-1], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        (PNDMScheduler, {"skip_prk_steps": True}),  # as Stable Diffusion 1.5 comes
        (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
        (UniPCMultistepScheduler, {}),
        (EulerDiscreteScheduler, {}),  # as SDXL comes
    ],
)
def test_checkpoint_with_another_scheduler_is_sampled_by_ddim(
    scheduler: Any,
    options: dict[str, Any],
    tiny_sd: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Their steps have no density, and their configurations may say nothing of clipping."""
    shutil.copytree(tiny_sd, tmp_path / "other")
    file = tmp_path / "other" / "scheduler" / "scheduler_config.json"
    config = {k: v for k, v in json.loads(file.read_text()).items() if k != "clip_sample"}
    scheduler.from_config(config, **options).save_pretrained(file.parent)
    index = tmp_path / "other" / "model_index.json"
    index.write_text(index.read_text().replace("DDIMScheduler", scheduler.__name__))
    latents = torch.randn(2, *load(tiny_sd).latent_shape(16, 24))
    with caplog.at_level(logging.INFO, logger="mmalign"):
        ends = [
            roll_out(make_sampler(load(folder), 4, eta=0.0), latents, torch.zeros).latents[-1]
            for folder in (tiny_sd, tmp_path / "other")
        ]
    assert_close(ends[0], ends[1], atol=0, rtol=0)
    said = f"training samples with DDIM; the checkpoint's {scheduler.__name__} only evaluates"
    messages = [record.getMessage() for record in caplog.records]
    assert [message for message in messages if not message.startswith("loading ")] == [said]


def test_checkpoint_without_a_diffusion_schedule_is_refused(tiny_sd: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sd, tmp_path / "flow")
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "flow" / "scheduler")
    index = tmp_path / "flow" / "model_index.json"
    index.write_text(index.read_text().replace("DDIM", "FlowMatchEulerDiscrete"))
    with pytest.raises(InputError, match=r"FlowMatch.*has no alphas_cumprod.*DDIM, .*Euler"):
        load(tmp_path / "flow")


def test_a_trajectory_continues_from_any_step(tiny_sd: Path) -> None:
    adapter = load(tiny_sd)
    sampler = make_sampler(adapter, 4)
    drawn = [torch.randn(2, *adapter.latent_shape(16, 24)) for _ in range(5)]
    whole = roll_out(sampler, drawn[4], drawn.__getitem__, offload=True)
    rest = roll_out(sampler, whole.latents[2], drawn.__getitem__, first=2)
    assert_close(rest.latents, whole.latents[2:], atol=0, rtol=0)


def test_rows_keep_their_prompts(tiny_sdxl: Path) -> None:
    adapter = load(tiny_sdxl)
    sampler = make_sampler(adapter, 4)
    latents = torch.randn(2, *adapter.latent_shape(16, 24))
    both = sampler.transition(latents, 1).mean
    turned = sampler.rows([1, 0]).transition(latents.flip(0), 1).mean
    assert_close(turned, both.flip(0), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(both, sampler.rows([0, 0]).transition(latents, 1).mean)


def test_keyed_noise_does_not_depend_on_the_batch() -> None:
    both = keyed_noise((2, 3), [(0, "a"), (0, "b")], torch.device("cpu"))
    alone = keyed_noise((2, 3), [(0, "b")], torch.device("cpu"))
    assert_close(both[1:], alone, atol=0, rtol=0)
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize(("name", "steps"), [("tiny_sd", 0), ("tiny_sd", 1001), ("tiny_lcm", 0)])
def test_grids_are_checked(name: str, steps: int, request: pytest.FixtureRequest) -> None:
    with pytest.raises(InputError, match="num_inference_steps"):
        load(request.getfixturevalue(name)).sampler_grid(steps)


class Toy:
    """A denoiser epsilon = theta x on four noise levels, in float64."""

    def __init__(self) -> None:
        self.theta = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
        self.alphas = torch.tensor([0.999, 0.8, 0.4, 0.05], dtype=torch.float64)
        self.forwards = 0

    def guided_output(self, latents: Tensor, *_: object) -> Tensor:
        self.forwards += 1
        return self.theta * latents

    def transition(
        self, output: Tensor, latents: Tensor, timesteps: Tensor, prev: Tensor, *, eta: float
    ) -> Transition:
        return ddim_transition(
            output,
            latents,
            timesteps,
            prev,
            alphas_cumprod=self.alphas,
            prediction_type="epsilon",
            eta=eta,
        )


def toy_sampler(toy: Toy, eta: float = 0.0) -> Sampler:
    grid = SamplerGrid(torch.tensor([3, 2, 1]), toy.alphas[[2, 1, 0]])
    return Sampler(adapter=toy, condition={}, negative={}, grid=grid, guidance_scale=1.0, eta=eta)


X_T = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64)


def reward(latents: Tensor) -> Tensor:
    return -(latents - 1).square().flatten(1).sum(1)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("backprop_steps", "golden"),
    [(1, -2.5367439897134343), (2, -5.336512833040339), (3, -9.858594632531279)],
)
def test_reference_gradients_of_draft(
    backprop_steps: int, golden: float, checkpointing: bool
) -> None:
    toy = Toy()
    x0, taken = differentiable_sample(
        toy_sampler(toy),
        X_T,
        torch.zeros,
        backprop_steps=backprop_steps,
        checkpointing=checkpointing,
    )
    assert x0.item() == pytest.approx(2.238988034186326, abs=1e-9)
    assert [step for step, _, _ in taken] == [0, 1, 2][-backprop_steps:]
    rewards = reward(x0)
    assert rewards.item() == pytest.approx(-1.535091348856897, abs=1e-9)
    (-rewards).sum().backward()
    assert toy.theta.grad.item() == pytest.approx(golden, abs=1e-9)


def test_reference_numbers_of_draft_lv() -> None:
    toy = Toy()
    sampler = toy_sampler(toy)
    x0, _ = differentiable_sample(sampler, X_T, torch.zeros, backprop_steps=1)
    rewards = [reward(x0)]
    for value in (0.3, -0.4):
        noisy = noised_again(x0, torch.full_like(x0, value), 0.8)
        rewards.append(reward(sampler.transition(noisy, 2).pred_x0))
    loss, _ = draft_loss(torch.stack(rewards))
    loss.sum().backward()
    assert -loss.item() == pytest.approx(-1.216745314363475, abs=1e-9)
    assert toy.theta.grad.item() == pytest.approx(-2.203450349593325, abs=1e-9)


def test_gradient_equals_finite_differences_with_earlier_steps_frozen() -> None:
    """eta = 1: the noise is part of the path, and only the last two steps see the change."""
    drawn = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64).view(3, 1, 1, 1, 1)

    def value(toy: Toy, start: Tensor) -> Tensor:
        sampler = toy_sampler(toy, 1.0)
        for step in (1, 2):
            start = sampler.transition(start, step).draw(drawn[step])
        return reward(start).sum()

    toy = Toy()
    first = toy_sampler(toy, 1.0).transition(X_T, 0).draw(drawn[0]).detach()
    x0, _ = differentiable_sample(toy_sampler(toy, 1.0), X_T, drawn.__getitem__, backprop_steps=2)
    reward(x0).sum().backward()
    ends = []
    for shift in (1e-6, -1e-6):
        moved = Toy()
        moved.theta.data += shift
        ends.append(value(moved, first).item())
    assert toy.theta.grad.item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6)


def test_checkpointing_runs_trained_steps_again_and_nothing_else() -> None:
    toy = Toy()
    x0, _ = differentiable_sample(toy_sampler(toy), X_T, torch.zeros, backprop_steps=1)
    assert toy.forwards == 3
    reward(x0).sum().backward()
    assert toy.forwards == 4


@pytest.mark.parametrize("backprop_steps", [0, 4])
def test_backprop_steps_are_checked(backprop_steps: int) -> None:
    with pytest.raises(ValueError, match="backprop_steps"):
        differentiable_sample(toy_sampler(Toy()), X_T, torch.zeros, backprop_steps=backprop_steps)
