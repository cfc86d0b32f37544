from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mmalign.randomness import derive_seed, keyed_generator


def test_seeds_are_the_same_on_every_machine() -> None:
    """Fixed numbers: a change here changes every run of every user."""
    assert derive_seed(0) == 6711488920161924273
    assert derive_seed(3, 17, "pair-a", "noise") == 1712480541183683712


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((1, 2), (2, 1)),
        ((1,), ("1",)),
        (("a", "b"), ("ab",)),
        (("a", ""), ("a",)),
        ((12, 3), (1, 23)),
        ((0, 1, "noise"), (0, 1, "timestep")),
    ],
)
def test_different_keys_give_different_seeds(
    first: tuple[str | int, ...], second: tuple[str | int, ...]
) -> None:
    assert derive_seed(*first) != derive_seed(*second)


def test_seeds_fit_torch_and_spread_over_the_range() -> None:
    seeds = [derive_seed(7, step, "noise") for step in range(2000)]
    assert len(set(seeds)) == 2000
    assert min(seeds) >= 0
    assert max(seeds) < 2**63
    upper = sum(seed >= 2**62 for seed in seeds) / 2000
    assert 0.45 < upper < 0.55


def test_a_draw_depends_on_its_keys_alone() -> None:
    torch.manual_seed(1)
    first = torch.randn(5, generator=keyed_generator(0, 3, "x", "noise"))
    torch.manual_seed(2)
    torch.randn(100)
    keyed_generator(0, 4, "x", "noise")
    again = torch.randn(5, generator=keyed_generator(0, 3, "x", "noise"))
    other = torch.randn(5, generator=keyed_generator(0, 3, "y", "noise"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_global_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    torch.randn(3, generator=keyed_generator(5))
    assert torch.equal(torch.get_rng_state(), before)


def test_streams_of_neighbouring_keys_are_uncorrelated() -> None:
    draws = [torch.randn(4000, generator=keyed_generator(0, step)) for step in range(8)]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(8)
    assert correlation.abs().max() < 0.08


def test_deriving_a_seed_does_not_import_torch() -> None:
    code = "import sys, mmalign.randomness as r; r.derive_seed(1); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
