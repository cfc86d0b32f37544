from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from mmalign.objectives.draft import draft_loss, noised_again


def test_loss_averages_all_images_of_a_prompt() -> None:
    rewards = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]])
    loss, metrics = draft_loss(rewards, torch.tensor([0.1, 0.2]), kl_weight=10)
    assert_close(loss, torch.tensor([-3.0 + 1, -5.0 + 2]))
    assert metrics["reward"].item() == 1.5
    assert metrics["divergence"].item() == pytest.approx(0.15)


def test_without_divergence_it_is_the_reward() -> None:
    loss, metrics = draft_loss(torch.tensor([[2.0]]))
    assert loss.tolist() == [-2.0]
    assert "divergence" not in metrics


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"n \+ 1"):
        draft_loss(torch.zeros(3))
    with pytest.raises(ValueError, match="divergence"):
        draft_loss(torch.zeros(1, 3), torch.zeros(2), kl_weight=1)
    with pytest.raises(ValueError, match="kl_weight"):
        draft_loss(torch.zeros(1, 3), kl_weight=1)


def test_noised_again_is_noising_of_a_constant() -> None:
    latents = torch.full((1, 1, 1, 2), 2.0, requires_grad=True)
    noisy = noised_again(latents, torch.tensor([[[[1.0, -1.0]]]]), 0.64)
    assert_close(noisy, torch.tensor([[[[1.6 + 0.6, 1.6 - 0.6]]]]))
    assert not noisy.requires_grad
