from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Wave = Callable[..., Tensor]


@pytest.fixture(scope="session")
def wave() -> Wave:
    """Deterministic float64 tensors: sin(0.1 i + phase), the recipe of the reference numbers."""

    def make(phase: float, *shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        return torch.sin(0.1 * torch.arange(count, dtype=torch.float64) + phase).reshape(shape)

    return make


@pytest.fixture(scope="session")
def golden_errors(wave: Wave) -> tuple[Tensor, Tensor]:
    """Denoising errors (policy, reference) of two pairs, `[chosen; rejected]`."""
    target = torch.cat([wave(0, 1, 4, 2, 2), wave(5, 1, 4, 2, 2)]).repeat(2, 1, 1, 1)
    policy = target + 0.05 * wave(1, 4, 4, 2, 2)
    reference = target + 0.05 * wave(2, 4, 4, 2, 2)
    return tuple((m - target).square().mean((1, 2, 3)) for m in (policy, reference))
