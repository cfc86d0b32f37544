from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mmalign.config import PreferenceConfig
from mmalign.objectives.diffusion_dpo import diffusion_dpo_loss
from mmalign.types import InputError

SIGMOID = PreferenceConfig()
Errors = tuple[Tensor, Tensor]


@pytest.mark.parametrize(
    ("beta", "inside", "loss"),
    [
        (2000, [0.023572187432009933, -0.014666558775578202], 0.6909689447192631),
        (5000, [0.05893046858002483, -0.0366663969389455], 0.687882203092728),
    ],
)
def test_reference_numbers(
    golden_errors: Errors, beta: float, inside: list[float], loss: float
) -> None:
    got, metrics = diffusion_dpo_loss(*golden_errors, beta=beta, preference=SIGMOID)
    assert got.mean().item() == pytest.approx(loss, abs=1e-6)
    want = -torch.sigmoid(torch.tensor(inside, dtype=torch.float64)).log()
    assert_close(got, want, atol=1e-6, rtol=0)
    assert metrics["rewards/margin"].item() == pytest.approx(sum(inside) / 2, abs=1e-6)
    assert metrics["rewards/accuracy"].item() == 0.5


def test_diffusers_convention_has_no_half(golden_errors: Errors) -> None:
    salesforce, _ = diffusion_dpo_loss(*golden_errors, beta=5000, preference=SIGMOID)
    diffusers, _ = diffusion_dpo_loss(
        *golden_errors, beta=2500, beta_convention="diffusers", preference=SIGMOID
    )
    assert_close(salesforce, diffusers, rtol=0, atol=0)


def test_unknown_convention_is_refused(golden_errors: Errors) -> None:
    with pytest.raises(KeyError):
        diffusion_dpo_loss(*golden_errors, beta=1, beta_convention="salesforc", preference=SIGMOID)


def test_policy_equal_to_reference(golden_errors: Errors) -> None:
    policy, _ = golden_errors
    loss, metrics = diffusion_dpo_loss(policy, policy.clone(), beta=5000, preference=SIGMOID)
    assert_close(loss, torch.full_like(loss, math.log(2)))
    assert metrics["rewards/accuracy"].item() == 0.5
    assert metrics["margin"].item() == 0


def test_swapping_sides_flips_the_margin(golden_errors: Errors) -> None:
    _, metrics = diffusion_dpo_loss(*golden_errors, beta=5000, preference=SIGMOID)
    swapped = (error.roll(2) for error in golden_errors)
    _, other = diffusion_dpo_loss(*swapped, beta=5000, preference=SIGMOID)
    assert metrics["margin"].item() != 0
    assert_close(metrics["margin"], -other["margin"])
    assert_close(metrics["rewards/chosen"], other["rewards/rejected"])


def test_gradients(golden_errors: Errors) -> None:
    policy = golden_errors[0].clone().requires_grad_()
    reference = golden_errors[1].clone().requires_grad_()

    def loss(error: Tensor) -> Tensor:
        return diffusion_dpo_loss(error, reference, beta=50, preference=SIGMOID)[0]

    assert torch.autograd.gradcheck(loss, policy)
    loss(policy).sum().backward()
    assert (policy.grad[:2] > 0).all()
    assert (policy.grad[2:] < 0).all()
    assert reference.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_at_extreme_errors(dtype: torch.dtype) -> None:
    policy = torch.tensor([1e4, 0, -1e4, 0, 1e4, 0], dtype=dtype, requires_grad=True)
    loss, _ = diffusion_dpo_loss(policy, torch.zeros(6, dtype=dtype), beta=5000, preference=SIGMOID)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert policy.grad.isfinite().all()


def test_other_losses_and_their_scores_pass_through(golden_errors: Errors) -> None:
    offset = PreferenceConfig(loss_type="offset", offset_scale=2.0)
    with pytest.raises(InputError):
        diffusion_dpo_loss(*golden_errors, beta=2000, preference=offset)
    scores = torch.tensor([0.5, 0.25])
    loss, _ = diffusion_dpo_loss(*golden_errors, beta=2000, preference=offset, score_margins=scores)
    inside = torch.tensor([0.023572187432009933 - 1.0, -0.014666558775578202 - 0.5]).double()
    assert_close(loss, -torch.sigmoid(inside).log(), atol=1e-6, rtol=0)


def test_denoising_errors_are_logged(golden_errors: Errors) -> None:
    policy, reference = golden_errors
    _, metrics = diffusion_dpo_loss(policy, reference, beta=1, preference=SIGMOID)
    assert_close(metrics["denoising_error/policy_chosen"], policy[:2].mean())
    assert_close(metrics["denoising_error/policy_rejected"], policy[2:].mean())
    assert_close(metrics["denoising_error/ref_chosen"], reference[:2].mean())
    assert_close(metrics["denoising_error/ref_rejected"], reference[2:].mean())
