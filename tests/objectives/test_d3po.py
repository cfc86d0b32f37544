from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mmalign.config import PreferenceConfig
from mmalign.objectives.d3po import (
    BestWorst,
    best_and_worst,
    clamp_logratios,
    d3po_loss,
    dominating_pair,
)
from mmalign.types import LogRatios

SIGMOID = PreferenceConfig()
CHOSEN = torch.tensor([0.002689738321031032, 0.0011361072904940706], dtype=torch.float64)
REJECTED = torch.tensor([0.002605317644665761, 0.006961513393441976], dtype=torch.float64)


@pytest.mark.parametrize(("beta", "golden"), [(0.1, 0.6932907264096615), (10, 0.707711754662849)])
def test_reference_numbers_of_d3po_and_spo(beta: float, golden: float) -> None:
    loss, metrics = d3po_loss(
        LogRatios(CHOSEN, REJECTED), beta=beta, preference=SIGMOID, clamp="both"
    )
    assert loss.mean().item() == pytest.approx(golden, abs=1e-9)
    assert metrics["clamped"].item() == 0
    assert metrics["margin"].item() == pytest.approx((CHOSEN - REJECTED).mean().item())


def test_reference_number_with_the_clamp_active() -> None:
    sides = LogRatios(torch.tensor([0.5]).double(), torch.tensor([-0.5]).double())
    loss, metrics = d3po_loss(sides, beta=0.1, preference=SIGMOID, clamp="both")
    assert loss.item() == pytest.approx(0.6831639808523141, abs=1e-9)
    assert metrics["clamped"].item() == 1
    assert metrics["margin"].item() == pytest.approx(1.0)


def test_loss_is_ln_2_before_the_first_update() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    loss, metrics = d3po_loss(LogRatios(zero, zero), beta=0.1, preference=SIGMOID)
    assert_close(loss, torch.full((3,), math.log(2), dtype=torch.float64))
    assert metrics["rewards/accuracy"].item() == 0.5


def test_swapping_sides_flips_the_margin() -> None:
    _, metrics = d3po_loss(LogRatios(CHOSEN, REJECTED), beta=10, preference=SIGMOID)
    _, swapped = d3po_loss(LogRatios(REJECTED, CHOSEN), beta=10, preference=SIGMOID)
    assert metrics["margin"].item() == -swapped["margin"].item() != 0


@pytest.mark.parametrize(
    ("clamp", "moves"),
    [("both", [False, False]), ("one_sided", [True, False]), ("none", [True, True])],
)
def test_which_samples_keep_their_gradient(clamp: str, moves: list[bool]) -> None:
    """A chosen sample far below the interval, then one far above it."""
    chosen = torch.tensor([-0.5, 0.5], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([0.5, -0.5], dtype=torch.float64, requires_grad=True)
    loss, _ = d3po_loss(LogRatios(chosen, rejected), beta=1.0, preference=SIGMOID, clamp=clamp)
    loss.sum().backward()
    assert [bool(g) for g in chosen.grad] == moves
    assert [bool(g) for g in rejected.grad] == moves


def test_clamp_is_on_the_ratio_not_on_its_logarithm() -> None:
    far = torch.tensor([3.0, -3.0], dtype=torch.float64)
    clamped = clamp_logratios(LogRatios(far, far), clip_range=0.2, clamp="both")
    assert_close(clamped.chosen.exp(), torch.tensor([1.2, 0.8], dtype=torch.float64))
    with pytest.raises(ValueError, match="clip_range"):
        clamp_logratios(LogRatios(far, far), clip_range=1.0, clamp="both")


def test_gradient() -> None:
    assert torch.autograd.gradcheck(
        lambda c, r: d3po_loss(LogRatios(c, r), beta=5.0, preference=SIGMOID)[0],
        (CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()),
    )


@pytest.mark.parametrize("clamp", ["both", "one_sided", "none"])
def test_finite_at_extreme_log_ratios(clamp: str) -> None:
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    loss, _ = d3po_loss(
        LogRatios(chosen, -chosen.detach()), beta=10, preference=SIGMOID, clamp=clamp
    )
    loss.sum().backward()
    assert loss.isfinite().all()
    assert chosen.grad.isfinite().all()


def test_reference_pairs_of_spo() -> None:
    scores = torch.tensor([[20.1, 20.0], [20.9, 20.1], [20.3, 20.2], [19.8, 20.3]])
    best, worst, decided = best_and_worst(scores, min_gap=0.3)
    assert torch.stack([best, worst], 1).tolist() == [[1, 3], [3, 0]]
    assert decided.tolist() == [True, False]


def test_ties_are_never_decided() -> None:
    pair = best_and_worst(torch.tensor([[1.0, 1.0], [1.0, 1.1]]))
    assert isinstance(pair, BestWorst)
    assert pair.decided.tolist() == [False, True]


def test_pareto_wants_no_reward_lower() -> None:
    """Columns: 0 beats 2 widely and 1 narrowly; nobody dominates; equal in one, better in one."""
    first = torch.tensor([[3.0, 1.0, 2.0], [2.0, 0.0, 2.0], [1.0, 2.0, 1.0]])
    second = torch.tensor([[3.0, 0.0, 5.0], [2.0, 1.0, 4.0], [1.0, -1.0, 9.0]])
    best, worst, decided = dominating_pair(torch.stack([first, second]))
    assert decided.tolist() == [True, False, True]
    assert (best[0], worst[0]) == (0, 2)
    assert (best[2], worst[2]) == (0, 1)
    assert not dominating_pair(torch.ones(2, 3, 1)).decided
    with pytest.raises(ValueError, match="K >= 2"):
        dominating_pair(torch.ones(2, 1, 1))


@pytest.mark.parametrize(("shape", "gap"), [((1, 3), 0.0), ((3,), 0.0), ((2, 3), 1.0)])
def test_scores_are_checked(shape: tuple[int, ...], gap: float) -> None:
    with pytest.raises(ValueError, match=r"scores|min_gap"):
        best_and_worst(Tensor(*shape).zero_(), min_gap=gap)
