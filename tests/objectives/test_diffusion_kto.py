from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mmalign.objectives.diffusion_kto import KlEstimate, diffusion_kto_loss

GOOD_FIRST = torch.tensor([True, True, False, False])


def test_reference_number(golden_errors: tuple[Tensor, Tensor]) -> None:
    loss, _ = diffusion_kto_loss(*golden_errors, GOOD_FIRST, beta=1000)
    assert loss.mean().item() == pytest.approx(0.49962603046323417, abs=1e-9)


@pytest.mark.parametrize(
    ("kl_estimate", "kl"), [("batch_mean", 0.05), ("balanced_mean", 0.4 / 3), ("none", 0.0)]
)
def test_closed_form(kl_estimate: KlEstimate, kl: float) -> None:
    logratios = [0.3, -0.2, 0.1, 0.0]
    good = [True, False, False, False]
    reference = torch.ones(4, dtype=torch.float64)
    loss, metrics = diffusion_kto_loss(
        reference - torch.tensor(logratios, dtype=torch.float64),
        reference,
        torch.tensor(good),
        beta=3.0,
        kl_estimate=kl_estimate,
        desirable_weight=2.0,
        undesirable_weight=0.5,
    )
    want = [
        (2.0 if y else 0.5) * (1 - 1 / (1 + math.exp(-(1 if y else -1) * 3 * (g - kl))))
        for g, y in zip(logratios, good, strict=True)
    ]
    assert_close(loss, torch.tensor(want, dtype=torch.float64))
    assert metrics["kl"].item() == pytest.approx(kl)
    assert metrics["rewards/chosen"].item() == pytest.approx(0.9)
    assert metrics["rewards/margin"].item() == pytest.approx(0.9 + 0.1)
    assert metrics["denoising_error/policy_chosen"].item() == pytest.approx(0.7)
    assert metrics["denoising_error/ref_rejected"].item() == 1.0


def test_baseline_is_never_negative() -> None:
    for kl_estimate in ("batch_mean", "balanced_mean"):
        _, metrics = diffusion_kto_loss(
            torch.full((4,), 2.0), torch.ones(4), GOOD_FIRST, beta=1.0, kl_estimate=kl_estimate
        )
        assert metrics["kl"].item() == 0
        assert metrics["rewards/chosen"].item() == -1


def test_policy_equal_to_reference() -> None:
    error = torch.tensor([0.1, 0.2, 0.3, 0.4])
    loss, metrics = diffusion_kto_loss(error, error, GOOD_FIRST, beta=1000)
    assert_close(loss, torch.full((4,), 0.5))
    assert metrics["rewards/accuracy"].item() == 0.5


def test_swapping_labels_flips_the_margin(golden_errors: tuple[Tensor, Tensor]) -> None:
    shifted = golden_errors[0] + torch.tensor([0.0, 0.1, 0.2, 0.0])
    _, metrics = diffusion_kto_loss(shifted, golden_errors[1], GOOD_FIRST, beta=10)
    _, swapped = diffusion_kto_loss(shifted, golden_errors[1], ~GOOD_FIRST, beta=10)
    assert metrics["margin"].item() != 0
    assert_close(metrics["margin"], -swapped["margin"])


@pytest.mark.parametrize("kl_estimate", ["batch_mean", "balanced_mean"])
def test_one_label_only(kl_estimate: KlEstimate) -> None:
    policy = torch.tensor([0.5, 0.7], requires_grad=True)
    loss, metrics = diffusion_kto_loss(
        policy, torch.ones(2), torch.tensor([True, True]), beta=1.0, kl_estimate=kl_estimate
    )
    loss.sum().backward()
    assert policy.grad.isfinite().all()
    assert metrics["kl"].item() == pytest.approx(0.4)
    assert metrics["rewards/rejected"].isnan()


def test_gradients_skip_baseline_and_reference() -> None:
    policy = torch.tensor([0.5, 0.7, 0.9], dtype=torch.float64, requires_grad=True)
    reference = torch.ones(3, dtype=torch.float64, requires_grad=True)
    good = torch.tensor([True, False, True])
    loss, metrics = diffusion_kto_loss(policy, reference, good, beta=2.0)
    loss.sum().backward()
    sign = torch.tensor([1.0, -1.0, 1.0])
    s = torch.sigmoid(sign * 2 * (1 - policy.detach() - metrics["kl"]))
    assert_close(policy.grad, sign * 2 * s * (1 - s))
    assert reference.grad is None
    assert torch.autograd.gradcheck(
        lambda p: diffusion_kto_loss(p, reference, good, beta=2.0, kl_estimate="none")[0], policy
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_at_extreme_errors(dtype: torch.dtype) -> None:
    policy = torch.tensor([1e4, -1e4, 1e4, -1e4], dtype=dtype, requires_grad=True)
    loss, _ = diffusion_kto_loss(policy, torch.zeros(4, dtype=dtype), GOOD_FIRST, beta=1000)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert policy.grad.isfinite().all()


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"\(N,\)"):
        diffusion_kto_loss(torch.zeros(4), torch.zeros(4), torch.ones(2), beta=1.0)
