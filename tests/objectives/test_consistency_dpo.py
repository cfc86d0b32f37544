from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import LCMScheduler
from torch import Tensor
from torch.testing import assert_close

from mmalign import diffusion
from mmalign.config import PreferenceConfig
from mmalign.objectives.consistency_dpo import (
    consistency_dpo_loss,
    pseudo_huber_distance,
    teacher_step,
)

SIGMOID = PreferenceConfig()
Wave = Callable[..., Tensor]


@pytest.fixture(scope="module")
def scheduler() -> LCMScheduler:
    return LCMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False
    )


@pytest.fixture
def distances(wave: Wave) -> tuple[Tensor, Tensor]:
    shape = (2, 4, 2, 2)
    target = torch.cat([wave(0, *shape), wave(3, *shape)])
    policy = target + 0.02 * torch.cat([wave(1, *shape), wave(2, *shape)])
    reference = target + 0.02 * torch.cat([wave(4, *shape), wave(6, *shape)])
    return pseudo_huber_distance(policy, target), pseudo_huber_distance(reference, target)


def test_reference_numbers(distances: tuple[Tensor, Tensor]) -> None:
    loss, metrics = consistency_dpo_loss(*distances, beta=200, preference=SIGMOID)
    inside = torch.tensor([-0.053528651552869205, 0.13076988489437238], dtype=torch.float64)
    assert loss.mean().item() == pytest.approx(0.6750839701213855, abs=1e-6)
    assert_close(loss, -torch.sigmoid(inside).log(), atol=1e-6, rtol=0)
    assert_close(metrics["rewards/margin"], inside.mean(), atol=1e-6, rtol=0)
    assert_close(metrics["denoising_error/ref_rejected"], distances[1][2:].mean())


def test_policy_equal_to_reference(distances: tuple[Tensor, Tensor]) -> None:
    loss, metrics = consistency_dpo_loss(distances[0], distances[0], beta=200, preference=SIGMOID)
    assert_close(loss, torch.full_like(loss, math.log(2)))
    assert metrics["rewards/accuracy"].item() == 0.5


def test_swapping_sides_flips_the_margin(distances: tuple[Tensor, Tensor]) -> None:
    _, metrics = consistency_dpo_loss(*distances, beta=200, preference=SIGMOID)
    swapped = (distance.roll(2) for distance in distances)
    _, other = consistency_dpo_loss(*swapped, beta=200, preference=SIGMOID)
    assert metrics["margin"].item() != 0
    assert_close(metrics["margin"], -other["margin"])


def test_gradients_reach_the_policy_only(wave: Wave) -> None:
    target = wave(0, 2, 1, 2, 2)
    reference = wave(2, 2, 1, 2, 2).requires_grad_()
    prediction = wave(1, 2, 1, 2, 2).requires_grad_()

    def loss(output: Tensor) -> Tensor:
        policy = pseudo_huber_distance(output, target)
        ref = pseudo_huber_distance(reference, target)
        return consistency_dpo_loss(policy, ref, beta=3, preference=SIGMOID)[0]

    assert torch.autograd.gradcheck(loss, prediction)
    loss(prediction).sum().backward()
    assert reference.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_at_extremes(dtype: torch.dtype) -> None:
    prediction = torch.tensor([1e4, 0.0, 0.0, -1e4], dtype=dtype).view(4, 1, 1, 1)
    prediction.requires_grad_()
    policy = pseudo_huber_distance(prediction, torch.zeros(4, 1, 1, 1, dtype=dtype))
    loss, _ = consistency_dpo_loss(
        policy, torch.zeros(4, dtype=dtype), beta=200, preference=SIGMOID
    )
    loss.sum().backward()
    assert loss.isfinite().all()
    assert prediction.grad.isfinite().all()


def test_pseudo_huber_distance(wave: Wave) -> None:
    a, b = wave(0, 3, 4, 2, 2), wave(2, 3, 4, 2, 2)
    want = ((a - b).square() + 0.01**2).sqrt() - 0.01
    assert_close(pseudo_huber_distance(a, b, huber_c=0.01), want.mean((1, 2, 3)))
    with pytest.raises(ValueError, match="huber_c"):
        pseudo_huber_distance(a, b, huber_c=0.0)


def test_pseudo_huber_distance_keeps_small_differences_in_float32() -> None:
    a = torch.full((1, 1, 1, 1), 1e-7)
    got = pseudo_huber_distance(a, torch.zeros_like(a), huber_c=1e-3)
    assert got.item() == pytest.approx((1e-7) ** 2 / 2e-3, rel=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_teacher_step_guides_latents_and_noise(
    prediction_type: str, scheduler: LCMScheduler, wave: Wave
) -> None:
    alphas = scheduler.alphas_cumprod.double()
    grid = diffusion.ddim_grid(alphas, 50)
    cond, uncond, noisy = (wave(k, 2, 4, 2, 2) for k in (0, 1, 2))
    timesteps = torch.tensor([19, 539])
    omega = torch.tensor([5.0, 12.5], dtype=torch.float64)
    got = teacher_step(
        cond,
        uncond,
        noisy,
        timesteps,
        omega + 1,
        alphas_cumprod=alphas,
        prediction_type=prediction_type,
        grid=grid,
    )
    w = omega.view(2, 1, 1, 1)
    state = (noisy, timesteps, alphas, prediction_type)
    x0_cond, x0_uncond = (diffusion.pred_x0(o, *state) for o in (cond, uncond))
    eps_cond, eps_uncond = (diffusion.noise_pred(o, *state) for o in (cond, uncond))
    x0 = x0_cond + w * (x0_cond - x0_uncond)
    eps = eps_cond + w * (eps_cond - eps_uncond)
    previous = alphas[[0, 519]].view(2, 1, 1, 1)
    assert got.next_timesteps.tolist() == [0, 519]
    assert_close(got.next_latents, previous.sqrt() * x0 + (1 - previous).sqrt() * eps)


def test_teacher_step_off_the_grid_is_refused(scheduler: LCMScheduler, wave: Wave) -> None:
    x = wave(0, 1, 4, 2, 2)
    with pytest.raises(ValueError, match="DDIM grid"):
        teacher_step(
            x,
            x,
            x,
            torch.tensor([20]),
            torch.tensor([7.0]),
            alphas_cumprod=scheduler.alphas_cumprod,
            prediction_type="epsilon",
            grid=diffusion.ddim_grid(scheduler.alphas_cumprod, 50),
        )
