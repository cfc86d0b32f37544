from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from torch import Tensor
from torch.testing import assert_close

from mmalign.diffusion import (
    Transition,
    consistency_transition,
    ddim_transition,
    transition_logp,
    transition_logratio,
)

BETAS: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
}
SHAPE = (2, 4, 2, 2)


def wave(phase: float, *shape: int) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.sin(0.1 * torch.arange(count, dtype=torch.float64) + phase).reshape(shape)


def golden_step(output: Tensor, alphas: Tensor) -> Transition:
    """Two steps of a grid of 20: 951 to 901, and the last one, from 1 to alpha-bar of 0."""
    return ddim_transition(
        output,
        wave(0, *SHAPE),
        torch.tensor([951, 1]),
        alphas[[901, 0]],
        alphas_cumprod=alphas,
        prediction_type="epsilon",
        eta=1.0,
    )


def test_golden_log_densities(alphas: Tensor) -> None:
    latents = wave(3, *SHAPE)
    policy, reference = (golden_step(wave(phase, *SHAPE), alphas) for phase in (1, 1.2))
    variance = torch.tensor([0.4152397789394179, 0.0004263531256488216]).double()
    assert_close(policy.std.square(), variance, atol=1e-8, rtol=0)
    want = torch.tensor([-2.109285303953893, -2556.7556175795753], dtype=torch.float64)
    assert_close(transition_logp(latents, policy), want, atol=1e-6, rtol=0)
    want = torch.tensor([-2.2566405874720434, -2568.8923684473507], dtype=torch.float64)
    assert_close(transition_logp(latents, reference), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("phase", "golden"),
    [(4, [0.002689738321031032, 0.0011361072904940706]), (5, [0.0026053176446, 0.0069615133934])],
)
def test_golden_log_ratios(phase: float, golden: list[float], alphas: Tensor) -> None:
    reference = golden_step(wave(1, *SHAPE), alphas)
    policy = golden_step(wave(1, *SHAPE) + 0.01 * wave(2, *SHAPE), alphas)
    latents = reference.draw(wave(phase, *SHAPE))
    got = transition_logratio(latents, policy, reference)
    assert_close(got, torch.tensor(golden, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_density_equals_torch_distributions(reduction: Any, alphas: Tensor) -> None:
    latents = wave(3, *SHAPE)
    policy, reference = (golden_step(wave(phase, *SHAPE), alphas) for phase in (1, 1.2))
    want = []
    for transition in (policy, reference):
        normal = torch.distributions.Normal(transition.mean, transition.std.view(-1, 1, 1, 1))
        want.append(getattr(normal.log_prob(latents).flatten(1), reduction)(1))
        assert_close(transition_logp(latents, transition, reduction=reduction), want[-1])
    got = transition_logratio(latents, policy, reference, reduction=reduction)
    assert_close(got, want[0] - want[1])
    same = transition_logratio(latents, policy, policy, reduction=reduction)
    assert same.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("prediction_type", "zero_snr"),
    [("epsilon", False), ("v_prediction", False), ("v_prediction", True)],
)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_equals_the_scheduler_at_every_step(
    prediction_type: Any, zero_snr: bool, spacing: str, eta: float
) -> None:
    scheduler = DDIMScheduler(
        **BETAS,
        prediction_type=prediction_type,
        timestep_spacing=spacing,
        set_alpha_to_one=False,
        steps_offset=1,
        rescale_betas_zero_snr=zero_snr,
    )
    scheduler.set_timesteps(7)
    output, noisy, noise = (wave(phase, *SHAPE) for phase in (1, 0, 2))
    for timestep in scheduler.timesteps.tolist():
        before = timestep - 1000 // 7
        alpha = scheduler.alphas_cumprod[max(before, 0)]
        got = ddim_transition(
            output,
            noisy,
            torch.full((2,), timestep),
            alpha.repeat(2),
            alphas_cumprod=scheduler.alphas_cumprod,
            prediction_type=prediction_type,
            eta=eta,
        )
        want = scheduler.step(output, timestep, noisy, eta=eta, variance_noise=noise)
        assert_close(got.pred_x0, want.pred_original_sample, atol=2e-5, rtol=1e-6)
        if zero_snr and eta == 1 and timestep == 999:
            # All of the next latents' noise is fresh; diffusers takes the root of -6e-8 here.
            assert_close(got.mean, alpha.sqrt() * got.pred_x0)
        else:
            assert_close(got.draw(noise), want.prev_sample, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_consistency_step_equals_the_lcm_scheduler_at_every_step(prediction_type: Any) -> None:
    scheduler = LCMScheduler(**BETAS, prediction_type=prediction_type)
    scheduler.set_timesteps(4)
    output, noisy = (wave(phase, *SHAPE).float() for phase in (1, 0))
    ends = [*scheduler.alphas_cumprod[scheduler.timesteps[1:]], torch.tensor(1.0)]
    for timestep, prev in zip(scheduler.timesteps.tolist(), ends, strict=True):
        generator = torch.Generator().manual_seed(timestep)
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(timestep))
        got = consistency_transition(
            output,
            noisy,
            torch.full((2,), timestep),
            prev.repeat(2),
            alphas_cumprod=scheduler.alphas_cumprod,
            prediction_type=prediction_type,
        )
        want = scheduler.step(output, timestep, noisy, generator=generator)
        assert_close(got.draw(noise), want.prev_sample, atol=1e-6, rtol=1e-6)
        assert_close(got.pred_x0, want.denoised, atol=1e-6, rtol=1e-6)
    assert got.std.tolist() == [0.0, 0.0]


def test_deterministic_steps_have_no_density(alphas: Tensor) -> None:
    step = golden_step(wave(1, *SHAPE), alphas)._replace(std=torch.tensor([0.5, 0.0]))
    with pytest.raises(ValueError, match="eta"):
        transition_logp(wave(0, *SHAPE), step)
    with pytest.raises(ValueError, match="eta"):
        transition_logratio(wave(0, *SHAPE), step, step)


def test_unknown_reduction_is_refused(alphas: Tensor) -> None:
    with pytest.raises(ValueError, match="median"):
        transition_logp(wave(0, *SHAPE), golden_step(wave(1, *SHAPE), alphas), reduction="median")


def test_half_precision_is_computed_in_float32(alphas: Tensor) -> None:
    step = ddim_transition(
        wave(1, *SHAPE).bfloat16(),
        wave(0, *SHAPE).bfloat16(),
        torch.tensor([951, 1]),
        alphas[[901, 0]].float(),
        alphas_cumprod=alphas.float(),
        prediction_type="epsilon",
        eta=1.0,
    )
    assert step.mean.dtype == step.std.dtype == step.pred_x0.dtype == torch.float32


def test_density_of_a_hand_worked_step() -> None:
    step = Transition(torch.zeros(1, 1, 1, 2), torch.tensor([2.0]), torch.zeros(1, 1, 1, 2))
    logp = transition_logp(torch.tensor([[[[2.0, 4.0]]]]), step, reduction="sum")
    each = -math.log(2) - 0.5 * math.log(2 * math.pi)
    assert logp.item() == pytest.approx(-0.5 - 2 + 2 * each)
