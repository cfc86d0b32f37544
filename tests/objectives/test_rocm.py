from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mmalign.diffusion import Transition
from mmalign.objectives.rocm import transition_divergence

Wave = Callable[..., Tensor]
ALL = ["kl", "hellinger", "fisher", "js"]


def gaussian(mean: Tensor, std: float) -> Transition:
    return Transition(mean, torch.full((len(mean),), std, dtype=mean.dtype), mean)


def test_reference_numbers() -> None:
    """|d|^2 = 0.37 over two elements, s^2 = 0.19."""
    mean = torch.tensor([[[[0.6, 0.1]]]], dtype=torch.float64)
    policy, reference = (gaussian(m, math.sqrt(0.19)) for m in (mean, torch.zeros_like(mean)))
    noise = torch.zeros_like(mean)
    golden = {"kl": 0.9736842105263158, "hellinger": 0.216058636303033, "fisher": 10.249307479224}
    for name, want in golden.items():
        got = transition_divergence(policy, reference, noise, divergence=name, reduction="sum")
        assert got.item() == pytest.approx(want, abs=1e-9)


def test_kl_equals_torch_distributions(wave: Wave) -> None:
    policy, reference = (gaussian(wave(phase, 2, 4, 2, 2), 0.7) for phase in (1, 2))
    normals = [torch.distributions.Normal(side.mean, 0.7) for side in (policy, reference)]
    elements = torch.distributions.kl_divergence(*normals).flatten(1)
    noise = wave(3, 2, 4, 2, 2)
    for reduction, want in (("sum", elements.sum(1)), ("mean", elements.mean(1))):
        got = transition_divergence(policy, reference, noise, divergence="kl", reduction=reduction)
        assert_close(got, want)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_jensen_shannon_is_unbiased(reduction: str) -> None:
    """Against numerical integration, one element at a time or one element in all."""
    shift, std = 0.9, 0.5
    x = torch.linspace(-6, 7, 20001, dtype=torch.float64)
    p, q = (torch.distributions.Normal(m, std).log_prob(x).exp() for m in (shift, 0.0))
    middle = (p + q) / 2
    integrand = 0.5 * (torch.special.xlogy(p, p / middle) + torch.special.xlogy(q, q / middle))
    want = torch.trapezoid(integrand.nan_to_num(), x)
    count = 200_000 if reduction == "sum" else 1
    width = 1 if reduction == "sum" else 200_000
    mean = torch.full((count, 1, 1, width), shift, dtype=torch.float64)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)).double()
    got = transition_divergence(
        gaussian(mean, std),
        gaussian(torch.zeros_like(mean), std),
        noise,
        divergence="js",
        reduction=reduction,
    )
    assert got.mean().item() == pytest.approx(want.item(), abs=2e-3)
    assert 0 < want < math.log(2)


@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equal_steps_do_not_diverge(divergence: str, reduction: str, wave: Wave) -> None:
    step = gaussian(wave(1, 2, 4, 2, 2), 0.7)
    got = transition_divergence(
        step, step, wave(3, 2, 4, 2, 2), divergence=divergence, reduction=reduction
    )
    assert_close(got, torch.zeros(2, dtype=torch.float64), atol=1e-15, rtol=0)


@pytest.mark.parametrize("divergence", ALL)
def test_gradient_reaches_the_policy_alone(divergence: str, wave: Wave) -> None:
    fixed = wave(2, 2, 4, 2, 2).requires_grad_()
    noise = wave(3, 2, 4, 2, 2)

    def value(mean: Tensor) -> Tensor:
        return transition_divergence(
            gaussian(mean, 0.7), gaussian(fixed, 0.7), noise, divergence=divergence
        )

    assert torch.autograd.gradcheck(value, wave(1, 2, 4, 2, 2).requires_grad_())
    value(wave(1, 2, 4, 2, 2).requires_grad_()).sum().backward()
    assert fixed.grad is None


def test_gradient_of_kl_with_respect_to_clean_latents(wave: Wave) -> None:
    """With mean = sqrt(a) f and s^2 = 1 - a it is a / (1 - a) (f - f_ref)."""
    alpha = 0.3
    clean, ref = wave(1, 2, 4, 2, 2).requires_grad_(), wave(2, 2, 4, 2, 2)
    policy, reference = (gaussian(math.sqrt(alpha) * f, math.sqrt(1 - alpha)) for f in (clean, ref))
    transition_divergence(policy, reference, ref, divergence="kl", reduction="sum").sum().backward()
    assert_close(clean.grad, alpha / (1 - alpha) * (clean - ref).detach())


def test_what_has_no_divergence_is_refused(wave: Wave) -> None:
    mean = wave(1, 2, 4, 2, 2)
    with pytest.raises(ValueError, match="deterministic"):
        transition_divergence(gaussian(mean, 0.0), gaussian(mean, 0.0), mean, divergence="kl")
    for options in ({"divergence": "tv"}, {"divergence": "kl", "reduction": "max"}):
        with pytest.raises(ValueError, match=r"tv|max"):
            transition_divergence(gaussian(mean, 1.0), gaussian(mean, 1.0), mean, **options)
