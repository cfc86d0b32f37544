"""Attention between the tokens of trees, as a function that transformers' models call.

A mask over all of a batch makes kernels compute pairs of tokens that do not see each other, half of
them in causal attention, and keeps the fastest ones from running at all. Here the tokens at the
beginning of a tree that see all before them go to a causal kernel, and only the others have a mask.
The trees of a batch stand one after the other in a single row, without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmalign.adapters._packing import Packed

NAME = "mmalign_forest"


@dataclass(frozen=True, eq=False, kw_only=True)
class Tree:
    """Who sees whom among T tokens.

    Attributes:
        size: T.
        stem: so many at the beginning see all before them.
        rest: what the others see, (T - stem, T) bool.
        first: the last layer is needed from this place on.
        late: what those places see, (T - first, T) bool.
    """

    size: int
    stem: int
    rest: Tensor
    first: int
    late: Tensor


@dataclass(frozen=True, eq=False)
class Forest:
    """The trees of a row, and the number of the layer that is needed in part, if any."""

    trees: tuple[Tree, ...]
    partial_layer: int | None

    @classmethod
    def of(
        cls, packed: Sequence[Packed], device: torch.device, partial_layer: int | None
    ) -> Forest:
        """Describe sequences."""
        return cls(tuple(_tree(sequence, device) for sequence in packed), partial_layer)


def use_forests(language_model: Any) -> None:
    """Let a language model of transformers take `forest=` along; without it nothing changes."""
    language_model.set_attn_implementation(NAME)


def no_mask(device: torch.device) -> Tensor:
    """Make what stops transformers from building a mask of its own: a finished one, not read."""
    return torch.empty(1, 1, 1, 1, dtype=torch.bool, device=device)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    forest: Forest | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend within each tree; returns (1, T, H, D).

    Args:
        module: the attention layer.
        query: (1, H, T, D), of all trees one after the other.
        key: (1, G, T, D), G a divisor of H.
        value: (1, G, T, D).
        attention_mask: used without a forest only.
        forest: the trees.
        options: what transformers passes to every attention.
    """
    if forest is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        return plain
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    is_partial = getattr(module, "layer_idx", None) == forest.partial_layer
    settings = {"scale": options.get("scaling"), "dropout_p": options.get("dropout", 0.0)}
    sizes = [tree.size for tree in forest.trees]
    queries, keys, values = (torch.split(t, sizes, 2) for t in (query, key, value))
    found = [
        part.transpose(1, 2)
        for tree, q, k, v in zip(forest.trees, queries, keys, values, strict=True)
        for part in _attend(tree, q, k, v, is_partial, options.get("sliding_window"), settings)
    ]
    return torch.cat(found, dim=1), None


def _attend(
    tree: Tree,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_partial: bool,
    window: int | None,
    settings: dict[str, Any],
) -> list[Tensor]:
    """Attend within a tree, in parts that follow each other, (1, H, ., D)."""
    sdpa = nn.functional.scaled_dot_product_attention
    start, mask = (tree.first, tree.late) if is_partial else (tree.stem, tree.rest)
    if window is not None and window < tree.size:
        if tree.stem < tree.size:
            raise ValueError("attention with a window needs sequences without branches")
        start = start if is_partial else 0
        mask = _near(tree.size, window, query.device)[start:]
    before, after = torch.split(query, [start, tree.size - start], 2)
    parts = []
    if is_partial or not start:
        parts.append(torch.zeros_like(before))
    else:
        stem = (before, key[:, :, :start], value[:, :, :start])
        parts.append(sdpa(*stem, is_causal=True, **settings))
    if start < tree.size:
        parts.append(sdpa(after, key, value, attn_mask=mask[None, None], **settings))
    return parts


def _near(size: int, window: int, device: torch.device) -> Tensor:
    """Let each token see itself and the `window` - 1 before it, (T, T) bool."""
    place = torch.arange(size, device=device)
    distance = place[:, None] - place
    return (distance >= 0) & (distance < window)


def _tree(sequence: Packed, device: torch.device) -> Tree:
    stem = sequence.stem
    first = min((int(path.sources[0]) for path in sequence.paths), default=0)
    return Tree(
        size=len(sequence.ids),
        stem=stem,
        rest=sequence.visible(stem).to(device),
        first=first,
        late=sequence.visible(first).to(device),
    )


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
