"""Attention within trees against one mask over everything, and against transformers' own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmalign.adapters._attention import Forest, attend
from mmalign.adapters._packing import Layout, Packed, Sharing, pack
from mmalign.types import Branches, ImageFeatures

LAST = 5
LAYOUT = Layout(
    image_token_id=9,
    positions=lambda ids, tensors: torch.arange(len(ids))[None],
    flat_positions=True,
)


def tokens(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def batch() -> list[Branches]:
    """Two questions about one image and one about another, with answers of all lengths."""
    same, other = (ImageFeatures(torch.zeros(2, 4), (), {}) for _ in range(2))
    return [
        Branches(tokens(1, 9, 9, 2, 3), (tokens(4, 5), tokens(6, 7, 8)), same),
        Branches(tokens(1, 9, 9, 2, 4, 4), (tokens(4), tokens(5, 5, 5, 5)), same),
        Branches(tokens(1, 9, 9, 5), (tokens(7, 7, 7),), other),
    ]


def whole_mask(packed: list[Packed]) -> torch.Tensor:
    """Write down who sees whom, from the paths alone: (T, T) bool over all sequences."""
    size = sum(len(sequence.ids) for sequence in packed)
    mask, start = torch.zeros(size, size, dtype=torch.bool), 0
    for sequence in packed:
        for path in sequence.paths:
            places = path.places + start
            for number, place in enumerate(places.tolist()):
                mask[place, places[: number + 1]] = True
        start += len(sequence.ids)
    return mask


def run(packed: list[Packed], layer: int, heads: int, **options: Any) -> list[torch.Tensor]:
    """Attend by trees; returns the output (T, H D) and gradients, weighed where it is needed."""
    query, key, value = states(packed, heads)
    forest = Forest.of(packed, torch.device("cpu"), LAST)
    module: Any = SimpleNamespace(layer_idx=layer)
    output, _ = attend(module, query, key, value, None, forest=forest, scaling=0.3, **options)
    return graded(output[0].flatten(1), packed, (query, key, value))


def expected(packed: list[Packed], mask: torch.Tensor, heads: int) -> list[torch.Tensor]:
    query, key, value = states(packed, heads)
    repeated = (t.repeat_interleave(4 // heads, dim=1) for t in (key, value))
    output = torch.nn.functional.scaled_dot_product_attention(
        query, *repeated, attn_mask=mask, scale=0.3
    )
    return graded(output[0].transpose(0, 1).flatten(1), packed, (query, key, value))


def states(packed: list[Packed], heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = sum(len(sequence.ids) for sequence in packed)
    return [
        torch.randn(1, h, size, 8, generator=generator, dtype=torch.double).requires_grad_()
        for h in (4, heads, heads)
    ]


def graded(
    output: torch.Tensor, packed: list[Packed], inputs: tuple[torch.Tensor, ...]
) -> list[torch.Tensor]:
    """Compare only where an answer is predicted, as the last layer is used."""
    start, places = 0, []
    for sequence in packed:
        places += [path.sources + start for path in sequence.paths]
        start += len(sequence.ids)
    picked = output[torch.cat(places)]
    weights = torch.arange(picked.numel(), dtype=torch.double).reshape_as(picked).sin()
    return [picked, *torch.autograd.grad((picked * weights).sum(), inputs)]


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("layer", [0, LAST])
@pytest.mark.parametrize(
    "sharing", [Sharing(prefixes=False), Sharing(), Sharing(images=True)], ids=str
)
def test_trees_are_one_mask_over_everything(sharing: Sharing, layer: int, heads: int) -> None:
    packed = pack(batch(), LAYOUT, sharing)
    assert len(packed) == {(False, False): 5, (True, False): 3, (True, True): 2}[sharing]
    mask = whole_mask(packed)
    for one, two in zip(run(packed, layer, heads), expected(packed, mask, heads), strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("layer", [0, LAST])
def test_a_window_hides_what_is_far(layer: int) -> None:
    packed = pack(batch(), LAYOUT, Sharing(prefixes=False))
    place = torch.arange(sum(len(sequence.ids) for sequence in packed))
    near = whole_mask(packed) & (place[:, None] - place < 3)
    found = run(packed, layer, 4, sliding_window=3)
    for one, two in zip(found, expected(packed, near, 4), strict=True):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=1e-12)
    with pytest.raises(ValueError, match="without branches"):
        run(pack(batch(), LAYOUT, Sharing()), layer, 4, sliding_window=3)


def test_the_first_answer_continues_the_stem() -> None:
    first, second, third = pack(batch(), LAYOUT, Sharing())
    assert [first.stem, second.stem, third.stem] == [7, 7, len(third.ids)]
    (tree, *_) = pack(batch(), LAYOUT, Sharing(images=True))
    assert tree.stem == 4 + 1 + 2  # what the questions share, the first's own token, its answer
