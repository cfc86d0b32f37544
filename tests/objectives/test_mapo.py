from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mmalign.objectives.mapo import mapo_loss


def closed_form(error: float, scale: float = 0.5) -> float:
    return scale * error / (math.exp(scale * error) - 1)


def authors_loss(error: Tensor) -> Tensor:
    """The authors' expression as it stands, at beta 0.1."""
    x = 0.5 * error
    odds = (x / (torch.exp(x) - 1)).chunk(2)
    return error.chunk(2)[0] - 0.1 * torch.sigmoid(1000 * (odds[0] - odds[1])).log()


def test_reference_number(golden_errors: tuple[Tensor, Tensor]) -> None:
    error = golden_errors[0]
    # The reference number is the authors' float32 result. exp(x) - 1 keeps four digits there, which
    # the factor 1000 turns into an error of 0.0075; their expression in float64 has no such error.
    assert authors_loss(error.float()).mean().item() == pytest.approx(0.0630594045, abs=1e-4)
    for dtype in (torch.float32, torch.float64):
        loss, _ = mapo_loss(error.to(dtype), beta=0.1)
        assert_close(loss.double(), authors_loss(error), atol=1e-6, rtol=0)


def test_closed_form_and_metrics() -> None:
    error = torch.tensor([0.2, 1.5, 0.6, 1.0], dtype=torch.float64)
    loss, metrics = mapo_loss(error, beta=0.3, score_scale=4.0, error_scale=2.0)
    log_odds = [closed_form(0.2, 2) - closed_form(0.6, 2), closed_form(1.5, 2) - closed_form(1, 2)]
    want = [
        chosen + 0.3 * math.log(1 + math.exp(-4 * odds))
        for chosen, odds in zip([0.2, 1.5], log_odds, strict=True)
    ]
    assert_close(loss, torch.tensor(want, dtype=torch.float64))
    assert metrics["margin"].item() == pytest.approx(sum(log_odds) / 2)
    assert metrics["rewards/margin"].item() == pytest.approx(4 * sum(log_odds) / 2)
    assert metrics["rewards/accuracy"].item() == 0.5
    assert metrics["denoising_error/policy_rejected"].item() == pytest.approx(0.8)


def test_equal_errors_give_log_two() -> None:
    loss, metrics = mapo_loss(torch.tensor([0.4, 0.0, 0.4, 0.0]), beta=2.0)
    assert_close(loss, torch.tensor([0.4, 0.0]) + 2 * math.log(2))
    assert metrics["rewards/accuracy"].item() == 0.5


def test_swapping_sides_flips_the_margin() -> None:
    error = torch.tensor([0.2, 0.6])
    _, metrics = mapo_loss(error, beta=0.1)
    _, swapped = mapo_loss(error.flip(0), beta=0.1)
    assert metrics["margin"] > 0
    assert_close(metrics["margin"], -swapped["margin"])


def test_gradcheck_on_both_branches_of_the_odds() -> None:
    error = torch.tensor([1e-3, 0.5, 0.021, 0.018, 3.0, 0.0199], dtype=torch.float64)
    error.requires_grad_()
    assert torch.autograd.gradcheck(lambda e: mapo_loss(e, beta=0.3, score_scale=5)[0], error)


@pytest.mark.parametrize("error", [0.0, 1e-8, 0.0199999, 0.02, 0.0200001])
def test_odds_are_accurate_near_zero(error: float) -> None:
    rows = torch.tensor([error, 0.5], dtype=torch.float64, requires_grad=True)
    _, metrics = mapo_loss(rows, beta=1.0, score_scale=1.0)
    x = 0.5 * error
    want = x / math.expm1(x) if x else 1.0
    assert metrics["rewards/chosen"].item() == pytest.approx(want, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_at_extreme_errors(dtype: torch.dtype) -> None:
    error = torch.tensor([1e4, 0.0, 1e4, 0.0, 1e4, 1e4], dtype=dtype, requires_grad=True)
    loss, _ = mapo_loss(error, beta=0.1)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert error.grad.isfinite().all()
