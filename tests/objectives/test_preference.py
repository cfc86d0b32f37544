from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mmalign.config import PreferenceConfig
from mmalign.objectives import preference
from mmalign.objectives.preference import preference_loss
from mmalign.types import InputError, LogRatios

BETA = 0.7
CHOSEN = torch.tensor([0.3, -1.2, 2.0, 0.05], dtype=torch.float64)
REJECTED = torch.tensor([-0.4, 0.9, 1.5, 0.06], dtype=torch.float64)
SCORES = torch.tensor([0.5, 1.0, -0.25, 2.0], dtype=torch.float64)
CONFIGS = {
    "sigmoid": PreferenceConfig(loss_type="sigmoid"),
    "ipo": PreferenceConfig(loss_type="ipo"),
    "hinge": PreferenceConfig(loss_type="hinge"),
    "robust": PreferenceConfig(loss_type="robust", label_smoothing=0.2),
    "offset": PreferenceConfig(loss_type="offset", offset_scale=0.3),
    "reverse_kl": PreferenceConfig(loss_type="reverse_kl"),
    "forward_kl": PreferenceConfig(loss_type="forward_kl"),
    "js": PreferenceConfig(loss_type="js"),
    "alpha": PreferenceConfig(loss_type="alpha", alpha=0.4),
}
every_member = pytest.mark.parametrize("name", list(CONFIGS))


def losses(name: str, chosen: Tensor, rejected: Tensor, beta: float = BETA) -> Tensor:
    scores = SCORES if len(chosen) == len(SCORES) else torch.zeros(len(chosen))
    return preference_loss(
        LogRatios(chosen, rejected), beta=beta, config=CONFIGS[name], score_margins=scores
    )[0]


def minus_log_sigmoid(x: float) -> float:
    return math.log(1 + math.exp(-x))


MARGIN_FORMS: dict[str, Callable[[float, float], float]] = {
    "sigmoid": lambda h, _: minus_log_sigmoid(BETA * h),
    "ipo": lambda h, _: (h - 1 / (2 * BETA)) ** 2,
    "hinge": lambda h, _: max(0.0, 1 - BETA * h),
    "robust": lambda h, _: (
        (0.8 * minus_log_sigmoid(BETA * h) - 0.2 * minus_log_sigmoid(-BETA * h)) / 0.6
    ),
    "offset": lambda h, score: minus_log_sigmoid(BETA * h - 0.3 * score),
}


@pytest.mark.parametrize("name", list(MARGIN_FORMS))
def test_margin_losses_equal_their_closed_form(name: str) -> None:
    form = MARGIN_FORMS[name]
    want = [
        form(c - r, s)
        for c, r, s in zip(CHOSEN.tolist(), REJECTED.tolist(), SCORES.tolist(), strict=True)
    ]
    assert_close(losses(name, CHOSEN, REJECTED), torch.tensor(want, dtype=torch.float64))


DIVERGENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda u: u * u.log(),
    "forward_kl": lambda u: -u.log(),
    "js": lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
    "alpha": lambda u: (u**0.6 - 0.6 * u - 0.4) / (0.4 * (0.4 - 1)),
}


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_divergence_losses_follow_from_f(name: str) -> None:
    def derivative(logratio: Tensor) -> Tensor:
        u = logratio.exp().requires_grad_()
        return torch.autograd.grad(DIVERGENCES[name](u).sum(), u)[0]

    want = -torch.sigmoid(BETA * (derivative(CHOSEN) - derivative(REJECTED))).log()
    assert_close(losses(name, CHOSEN, REJECTED), want)


def test_reverse_kl_is_dpo() -> None:
    assert_close(losses("reverse_kl", CHOSEN, REJECTED), losses("sigmoid", CHOSEN, REJECTED))


def test_alpha_lies_between_the_two_kl_divergences() -> None:
    for alpha, name in ((1e-7, "reverse_kl"), (1 - 1e-7, "forward_kl")):
        config = PreferenceConfig(loss_type="alpha", alpha=alpha)
        got, _ = preference_loss(LogRatios(CHOSEN, REJECTED), beta=BETA, config=config)
        assert_close(got, losses(name, CHOSEN, REJECTED), atol=1e-5, rtol=0)


@every_member
def test_value_at_policy_equal_to_reference(name: str) -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    want = {"ipo": 1 / (4 * BETA**2), "hinge": 1.0}.get(name, math.log(2))
    assert_close(losses(name, zero, zero), torch.full_like(zero, want))


@every_member
def test_gradient_at_policy_equal_to_reference_raises_chosen(name: str) -> None:
    chosen = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    rejected = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    losses(name, chosen, rejected).sum().backward()
    # d/dr f'(e^r) at r = 0 is f''(1): 1, except 1/2 for the Jensen-Shannon divergence.
    slope = {"ipo": 1 / BETA, "hinge": BETA, "robust": BETA / 0.6 / 2, "js": BETA / 4}
    want = torch.full((3,), -slope.get(name, BETA / 2), dtype=torch.float64)
    assert_close(chosen.grad, want)
    assert_close(rejected.grad, -want)


@every_member
def test_gradcheck(name: str) -> None:
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda c, r: losses(name, c, r), (chosen, rejected))


@every_member
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.1, 5000.0])
def test_finite_at_extreme_log_ratios(name: str, dtype: torch.dtype, beta: float) -> None:
    sides = list(itertools.product([-1e4, -50.0, 0.0, 50.0, 1e4], repeat=2))
    chosen, rejected = torch.tensor(sides, dtype=dtype).T
    chosen, rejected = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    loss = losses(name, chosen, rejected, beta)
    loss.sum().backward()
    assert loss.dtype == dtype
    assert all(value.isfinite().all() for value in (loss, chosen.grad, rejected.grad))
    if name != "ipo":
        assert (chosen.grad <= 0).all()
        assert (rejected.grad >= 0).all()


@pytest.mark.parametrize("name", ["forward_kl", "alpha"])
def test_very_unlikely_chosen_side_still_gets_a_gradient(name: str) -> None:
    chosen = torch.tensor([-1e4], requires_grad=True)
    losses(name, chosen, torch.zeros(1)).sum().backward()
    assert chosen.grad.item() < -1


@pytest.mark.parametrize("name", ["forward_kl", "js", "alpha", "reverse_kl"])
def test_small_log_ratios_keep_their_digits_in_float32(name: str) -> None:
    derivative = {
        "forward_kl": preference.forward_kl_derivative,
        "js": preference.js_derivative,
        "alpha": lambda r: preference.alpha_derivative(r, 0.4),
        "reverse_kl": preference.reverse_kl_derivative,
    }[name]
    logratios = torch.tensor([1e-6, -3e-7], dtype=torch.float64)
    assert_close(derivative(logratios.float()).double(), derivative(logratios), rtol=1e-5, atol=0)


def test_swapping_sides_flips_the_margin() -> None:
    config = CONFIGS["sigmoid"]
    _, metrics = preference_loss(LogRatios(CHOSEN, REJECTED), beta=BETA, config=config)
    _, swapped = preference_loss(LogRatios(REJECTED, CHOSEN), beta=BETA, config=config)
    for name in ("margin", "rewards/margin"):
        assert_close(metrics[name], -swapped[name])
        assert metrics[name] != 0
    assert_close(metrics["rewards/accuracy"], 1 - swapped["rewards/accuracy"])


def test_metrics() -> None:
    chosen = torch.tensor([1.0, 0.5, 2.0, 0.0], requires_grad=True)
    rejected = torch.tensor([0.0, 1.5, 2.0, -3.0])
    _, metrics = preference_loss(
        LogRatios(chosen, rejected), beta=2.0, config=PreferenceConfig(loss_type="sigmoid")
    )
    assert {name: value.item() for name, value in metrics.items()} == {
        "rewards/chosen": 2 * 3.5 / 4,
        "rewards/rejected": 2 * 0.5 / 4,
        "rewards/margin": 2 * 3.0 / 4,
        "rewards/accuracy": 2.5 / 4,
        "margin": 3.0 / 4,
    }
    assert not any(value.requires_grad for value in metrics.values())


def test_robust_loss_is_unbiased_under_flipped_labels() -> None:
    margin, flipped = CHOSEN - REJECTED, 0.2
    robust = [preference.robust_loss(h, BETA, flipped) for h in (margin, -margin)]
    expected = (1 - flipped) * robust[0] + flipped * robust[1]
    assert_close(expected, preference.sigmoid_loss(margin, BETA))


def test_half_precision_is_widened() -> None:
    ratios = LogRatios(CHOSEN.bfloat16(), REJECTED.bfloat16())
    loss, metrics = preference_loss(ratios, beta=BETA, config=CONFIGS["sigmoid"])
    assert loss.dtype == metrics["margin"].dtype == torch.float32


@pytest.mark.parametrize("scores", [None, torch.tensor([1.0, math.nan, 0.0, 2.0])])
def test_offset_without_score_margins_is_refused(scores: Tensor | None) -> None:
    with pytest.raises(InputError, match="score margin"):
        preference_loss(
            LogRatios(CHOSEN, REJECTED), beta=1.0, config=CONFIGS["offset"], score_margins=scores
        )


@pytest.mark.parametrize(
    "config",
    [
        PreferenceConfig(loss_type="robust", label_smoothing=0.5),
        PreferenceConfig(loss_type="robust", label_smoothing=-0.1),
        PreferenceConfig(loss_type="alpha", alpha=0.0),
        PreferenceConfig(loss_type="alpha", alpha=1.0),
        PreferenceConfig(loss_type="kto"),
    ],
)
def test_constants_out_of_range_are_refused(config: PreferenceConfig) -> None:
    with pytest.raises(InputError):
        preference_loss(LogRatios(CHOSEN, REJECTED), beta=1.0, config=config)
