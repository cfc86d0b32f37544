from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from mmalign.objectives.errors import error_logratios, error_metrics, split_pairs


def test_lower_error_is_a_higher_log_ratio() -> None:
    policy = torch.tensor([1.0, 2.0, 3.0, 4.0])
    chosen, rejected = error_logratios(policy, torch.tensor([1.5, 2.0, 1.0, 5.0]))
    assert_close(chosen, torch.tensor([0.5, 0.0]))
    assert_close(rejected, torch.tensor([-2.0, 1.0]))


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="3 rows"):
        split_pairs(torch.zeros(3))
    with pytest.raises(ValueError, match=r"\(2B,\)"):
        error_logratios(torch.zeros(4), torch.zeros(2))
    with pytest.raises(ValueError, match=r"\(2B,\)"):
        error_logratios(torch.zeros(4, 1), torch.zeros(4, 1))


def test_metrics_name_network_and_side() -> None:
    metrics = error_metrics(torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([0.0, 1.0, 2.0, 4.0]))
    assert {name: value.item() for name, value in metrics.items()} == {
        "denoising_error/policy_chosen": 2.0,
        "denoising_error/policy_rejected": 6.0,
        "denoising_error/ref_chosen": 0.5,
        "denoising_error/ref_rejected": 3.0,
    }
    assert set(error_metrics(torch.zeros(2))) == {
        "denoising_error/policy_chosen",
        "denoising_error/policy_rejected",
    }
