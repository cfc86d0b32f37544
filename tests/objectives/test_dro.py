from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mmalign.config import PreferenceConfig
from mmalign.objectives.diffusion_dpo import diffusion_dpo_loss
from mmalign.objectives.dro import dro_loss

Wave = Callable[..., Tensor]
GOOD_FIRST = torch.tensor([True, True, False, False])


@pytest.fixture(scope="module")
def flow_errors(wave: Wave) -> tuple[Tensor, Tensor]:
    """Errors of two linear flow models on two pairs whose sides have noises of their own."""
    clean = torch.cat([wave(0, 2, 4, 2, 2), wave(2, 2, 4, 2, 2)])
    noise = wave(7, 4, 4, 2, 2)
    t, condition = (
        torch.tensor(v, dtype=torch.float64).repeat(2).view(-1, 1, 1, 1)
        for v in ([0.3, 0.7], [1.0, 2.0])
    )
    noisy, target = (1 - t) * clean + t * noise, noise - clean
    policy = 0.9 * noisy + 0.01 * condition * t
    reference = 0.8 * noisy
    return tuple((out - target).square().flatten(1).mean(1) for out in (policy, reference))


def test_reference_numbers(flow_errors: tuple[Tensor, Tensor]) -> None:
    policy, reference = flow_errors
    golden = [0.355989137784158, 0.6971617349194634, 1.897912266998143, 1.231056273987819]
    assert_close(policy, torch.tensor(golden, dtype=torch.float64), atol=1e-6, rtol=0)
    loss, metrics = dro_loss(policy, GOOD_FIRST)
    # The authors average over pairs: twice the mean over samples.
    assert 2 * loss.mean().item() == pytest.approx(-1.0379088341411702, abs=1e-6)
    assert metrics["denoising_error/policy_chosen"].item() == pytest.approx(sum(golden[:2]) / 2)
    pairs, _ = diffusion_dpo_loss(policy, reference, beta=500, preference=PreferenceConfig())
    assert pairs.mean().item() == pytest.approx(12.60598990748467, abs=1e-6)


def test_labels_need_no_pairs() -> None:
    loss, metrics = dro_loss(torch.tensor([0.5, 0.7, 0.9]), torch.tensor([1, 1, 1]))
    assert_close(loss, torch.tensor([0.5, 0.7, 0.9]))
    assert metrics["denoising_error/policy_rejected"].isnan()


def test_swapping_labels_flips_the_loss() -> None:
    error = torch.tensor([0.5, 0.7])
    labels = torch.tensor([True, False])
    assert_close(dro_loss(error, labels)[0], -dro_loss(error, ~labels)[0])


def test_capped_losers_get_no_gradient() -> None:
    error = torch.tensor([2.0, 1.0, 1.3], requires_grad=True)
    labels = torch.tensor([True, False, False])
    loss, metrics = dro_loss(error, labels, ref_error=torch.ones(3), loser_cap=0.2)
    loss.sum().backward()
    assert_close(loss.detach(), torch.tensor([2.0, -1.0, -1.2]))
    assert error.grad.tolist() == [1.0, -1.0, 0.0]
    assert metrics["capped"].item() == 0.5


def test_anchor_pulls_back_to_the_reference() -> None:
    error = torch.tensor([1.5, 1.5], dtype=torch.float64, requires_grad=True)
    reference = torch.ones(2, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([True, False])
    loss, _ = dro_loss(error, labels, ref_error=reference, anchor_weight=4.0)
    loss.sum().backward()
    assert_close(loss.detach(), torch.tensor([1.5 + 1, -1.5 + 1], dtype=torch.float64))
    assert_close(error.grad, torch.tensor([1.0 + 4, -1.0 + 4], dtype=torch.float64))
    assert reference.grad is None


def test_input_is_checked() -> None:
    with pytest.raises(ValueError, match=r"\(N,\)"):
        dro_loss(torch.zeros(4), torch.ones(2))
    with pytest.raises(ValueError, match="ref_error"):
        dro_loss(torch.zeros(4), GOOD_FIRST, loser_cap=0.1)
    with pytest.raises(ValueError, match="loser_cap"):
        dro_loss(torch.zeros(4), GOOD_FIRST, ref_error=torch.ones(4), loser_cap=-0.1)
