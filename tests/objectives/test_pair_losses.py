"""Each loss against a formula of its own, written with Python's floats."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mmalign.config import PreferenceConfig
from mmalign.objectives.preference import Answers, preference_loss
from mmalign.types import InputError, LogRatios

BETA = 0.7
CHOSEN = torch.tensor([0.3, -1.2, 2.0, 0.05], dtype=torch.float64)
REJECTED = torch.tensor([-0.4, 0.9, 1.5, 0.06], dtype=torch.float64)
POLICY = LogRatios(
    torch.tensor([-12.0, -30.5, -8.0, -21.0], dtype=torch.float64),
    torch.tensor([-14.0, -22.0, -9.5, -25.0], dtype=torch.float64),
)
LENGTHS = LogRatios(torch.tensor([4, 11, 3, 7]), torch.tensor([5, 8, 4, 7]))
TEXTS = Answers(policy_logps=POLICY, lengths=LENGTHS)
CONFIGS = {
    "cdpo": PreferenceConfig(loss_type="cdpo", label_smoothing=0.2),
    "exo_pair": PreferenceConfig(loss_type="exo_pair", label_smoothing=0.01),
    "nca_pair": PreferenceConfig(loss_type="nca_pair"),
    "bco_pair": PreferenceConfig(loss_type="bco_pair"),
    "sppo_hard": PreferenceConfig(loss_type="sppo_hard"),
    "aot": PreferenceConfig(loss_type="aot", label_smoothing=0.1),
    "aot_unpaired": PreferenceConfig(loss_type="aot_unpaired", label_smoothing=0.1),
    "apo_zero": PreferenceConfig(loss_type="apo_zero"),
    "apo_down": PreferenceConfig(loss_type="apo_down"),
    "discopop": PreferenceConfig(loss_type="discopop", discopop_tau=0.05),
    "sft": PreferenceConfig(loss_type="sft"),
    "sigmoid_norm": PreferenceConfig(loss_type="sigmoid_norm"),
    "simpo": PreferenceConfig(loss_type="simpo", target_margin=0.5),
    "ipo": PreferenceConfig(loss_type="ipo", length_normalize=True),
}
every_member = pytest.mark.parametrize("name", list(CONFIGS))


def losses(name: str, chosen: Tensor, rejected: Tensor, answers: Answers = TEXTS) -> Tensor:
    return preference_loss(
        LogRatios(chosen, rejected), beta=BETA, config=CONFIGS[name], answers=answers
    )[0]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def smoothed(x: float, flipped: float) -> float:
    return -(1 - flipped) * math.log(sigmoid(x)) - flipped * math.log(sigmoid(-x))


def exo(x: float, flipped: float) -> float:
    q = sigmoid(x), sigmoid(-x)
    return sum(a * math.log(a / b) for a, b in zip(q, (1 - flipped, flipped), strict=True))


def discopop(x: float) -> float:
    mixture = sigmoid(x / 0.05)
    return (1 - mixture) * math.log(1 + math.exp(-x)) + mixture * math.exp(-x)


PAIR_FORMS: dict[str, Callable[[float, float], float]] = {
    "cdpo": lambda c, r: smoothed(BETA * (c - r), 0.2),
    "exo_pair": lambda c, r: exo(BETA * (c - r), 0.01),
    "nca_pair": lambda c, r: (
        -math.log(sigmoid(BETA * c))
        - (math.log(sigmoid(-BETA * c)) + math.log(sigmoid(-BETA * r))) / 2
    ),
    "bco_pair": lambda c, r: -math.log(sigmoid(BETA * c)) - math.log(sigmoid(-BETA * r)),
    "sppo_hard": lambda c, r: (c - 1 / (2 * BETA)) ** 2 + (r + 1 / (2 * BETA)) ** 2,
    "apo_zero": lambda c, r: 1 - sigmoid(BETA * c) + sigmoid(BETA * r),
    "apo_down": lambda c, r: sigmoid(BETA * c) + 1 - sigmoid(BETA * (c - r)),
    "discopop": lambda c, r: discopop(BETA * (c - r)),
}


@pytest.mark.parametrize("name", list(PAIR_FORMS))
def test_losses_of_a_pair_equal_their_closed_form(name: str) -> None:
    form = PAIR_FORMS[name]
    want = [form(c, r) for c, r in zip(CHOSEN.tolist(), REJECTED.tolist(), strict=True)]
    assert_close(losses(name, CHOSEN, REJECTED), torch.tensor(want, dtype=torch.float64))


def test_losses_of_texts_equal_their_closed_form() -> None:
    rows = list(
        zip(
            CHOSEN.tolist(),
            REJECTED.tolist(),
            *(side.tolist() for side in (*POLICY, *LENGTHS)),
            strict=True,
        )
    )
    forms: dict[str, Callable[..., float]] = {
        "sft": lambda c, r, pc, pr, nc, nr: -pc / nc,
        "sigmoid_norm": lambda c, r, pc, pr, nc, nr: smoothed(BETA * (c / nc - r / nr), 0),
        "simpo": lambda c, r, pc, pr, nc, nr: smoothed(BETA * (pc / nc - pr / nr) - 0.5, 0),
        "ipo": lambda c, r, pc, pr, nc, nr: (c / nc - r / nr - 1 / (2 * BETA)) ** 2,
    }
    for name, form in forms.items():
        want = torch.tensor([form(*row) for row in rows], dtype=torch.float64)
        assert_close(losses(name, CHOSEN, REJECTED), want)


def test_optimal_transport_compares_sorted_values() -> None:
    pairs = zip(sorted(CHOSEN.tolist()), sorted(REJECTED.tolist()), strict=True)
    want = [smoothed(BETA * (c - r), 0.1) for c, r in pairs]
    assert losses("aot_unpaired", CHOSEN, REJECTED).tolist() == pytest.approx(want)
    margins = (POLICY.chosen - POLICY.rejected).tolist()
    ref = [m - (c - r) for m, c, r in zip(margins, CHOSEN.tolist(), REJECTED.tolist(), strict=True)]
    want = [
        smoothed(BETA * (m - q), 0.1) for m, q in zip(sorted(margins), sorted(ref), strict=True)
    ]
    assert losses("aot", CHOSEN, REJECTED).tolist() == pytest.approx(want)
    assert sorted(margins) != margins


def test_optimal_transport_of_a_single_pair_is_conservative_dpo() -> None:
    one = Answers(policy_logps=LogRatios(*(side[:1] for side in POLICY)))
    config = PreferenceConfig(loss_type="cdpo", label_smoothing=0.1)
    want, _ = preference_loss(LogRatios(CHOSEN[:1], REJECTED[:1]), beta=BETA, config=config)
    for name in ("aot", "aot_unpaired"):
        assert_close(losses(name, CHOSEN[:1], REJECTED[:1], one), want)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("sft", "simpo")])
def test_value_at_policy_equal_to_reference(name: str) -> None:
    zero = torch.zeros(4, dtype=torch.float64)
    log2 = math.log(2)
    want = {
        "exo_pair": -log2 - (math.log(0.99) + math.log(0.01)) / 2,
        "nca_pair": 2 * log2,
        "bco_pair": 2 * log2,
        "sppo_hard": 2 / (2 * BETA) ** 2,
        "apo_zero": 1.0,
        "apo_down": 1.0,
        "discopop": (1 + log2) / 2,
        "ipo": 1 / (2 * BETA) ** 2,
    }
    assert_close(losses(name, zero, zero), torch.full_like(zero, want.get(name, log2)))


def test_minimum_of_conservative_dpo_is_at_the_assumed_share() -> None:
    margin = torch.tensor([math.log(0.8 / 0.2) / BETA], dtype=torch.float64, requires_grad=True)
    loss = losses("cdpo", margin, torch.zeros(1, dtype=torch.float64))
    loss.sum().backward()
    assert margin.grad.item() == pytest.approx(0, abs=1e-15)
    plain = PreferenceConfig(loss_type="cdpo", label_smoothing=0)
    got, _ = preference_loss(LogRatios(CHOSEN, REJECTED), beta=BETA, config=plain)
    want, _ = preference_loss(LogRatios(CHOSEN, REJECTED), beta=BETA, config=PreferenceConfig())
    assert_close(got, want)


def through_policy(name: str, chosen: Tensor, rejected: Tensor) -> Tensor:
    """Losses as functions of log-ratios, where the policy's log-probs move with them."""
    policy = LogRatios(POLICY.chosen + chosen, POLICY.rejected + rejected)
    return losses(name, chosen, rejected, Answers(policy_logps=policy, lengths=LENGTHS))


@every_member
def test_gradcheck(name: str) -> None:
    sides = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda c, r: through_policy(name, c, r), sides)


@every_member
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.1, 5000.0])
def test_finite_at_extreme_log_ratios(name: str, dtype: torch.dtype, beta: float) -> None:
    values = list(itertools.product([-1e4, -50.0, 0.0, 50.0, 1e4], repeat=2))
    sides = LogRatios(*(side.clone().requires_grad_() for side in torch.tensor(values).to(dtype).T))
    lengths = LogRatios(*(torch.full((len(values),), 3) for _ in range(2)))
    loss, metrics = preference_loss(
        sides,
        beta=beta,
        config=CONFIGS[name],
        answers=Answers(policy_logps=sides, lengths=lengths),
    )
    loss.sum().backward()
    assert loss.dtype == dtype
    rejected_grad = sides.rejected.grad
    assert loss.isfinite().all()
    assert sides.chosen.grad.isfinite().all()
    assert rejected_grad is None or rejected_grad.isfinite().all()
    assert all(value.isfinite() for value in metrics.values())


@every_member
def test_swapping_sides_flips_the_margin(name: str) -> None:
    ratios = LogRatios(CHOSEN, REJECTED)
    both = [
        preference_loss(sides, beta=BETA, config=CONFIGS[name], answers=TEXTS)[1]
        for sides in (ratios, LogRatios(*reversed(ratios)))
    ]
    assert both[0]["margin"] == -both[1]["margin"] != 0
    assert both[0]["rewards/accuracy"] == 1 - both[1]["rewards/accuracy"]


@pytest.mark.parametrize("name", ["aot", "sft", "simpo", "sigmoid_norm", "ipo"])
def test_losses_of_texts_are_refused_without_texts(name: str) -> None:
    with pytest.raises(InputError, match="of two answers"):
        losses(name, CHOSEN, REJECTED, Answers())


@pytest.mark.parametrize(
    "config",
    [
        PreferenceConfig(loss_type="exo_pair"),
        PreferenceConfig(loss_type="cdpo", label_smoothing=0.5),
        PreferenceConfig(loss_type="aot_unpaired", label_smoothing=-0.1),
        PreferenceConfig(loss_type="discopop", discopop_tau=0),
    ],
)
def test_constants_out_of_range_are_refused(config: PreferenceConfig) -> None:
    with pytest.raises(InputError):
        preference_loss(LogRatios(CHOSEN, REJECTED), beta=BETA, config=config)
