"""The attention layers of MPS, for weights in its authors' names.

The parts are public: multi-query attention (Shazeer 2019) with one head of keys and values,
parallel attention and feed-forward (PaLM), SwiGLU (Shazeer 2020), rotary positions (Su et al.
2021).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.rewards._weights import load_into
from mmalign.types import InputError

HEAD_WIDTH = 64


class Norm(nn.Module):
    """Layer norm whose bias is stored but not learned."""

    def __init__(self, width: int) -> None:
        """Build the layer."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.register_buffer("bias", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dim."""
        return F.layer_norm(x, x.shape[-1:], self.weight, self.get_buffer("bias"))


class SwiGlu(nn.Module):
    """First half of the last dim, gated by silu of the second."""

    def forward(self, x: Tensor) -> Tensor:
        """Halve the last dim."""
        values, gates = x.chunk(2, dim=-1)
        return F.silu(gates) * values


def _feed_forward_out(inner: int, width: int) -> list[nn.Module]:
    return [SwiGlu(), nn.Linear(inner, width, bias=False)]


def _attend(queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None) -> Tensor:
    """Attend with heads of queries (B, N, H, d) to one head of keys (B, L, d); (B, N, H d)."""
    scores = torch.einsum("bnhd,bld->bhnl", queries, keys) * HEAD_WIDTH**-0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, None, None, :], float("-inf"))
    return torch.einsum("bhnl,bld->bnhd", scores.softmax(-1), values).flatten(2)


class CrossAttention(nn.Module):
    """Attention to a context beside a feed-forward layer, both on the normalized input."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        """Build the layers."""
        super().__init__()
        self.norm = Norm(width)
        self.to_q = nn.Linear(width, heads * HEAD_WIDTH, bias=False)
        self.to_kv = nn.Linear(width, 2 * HEAD_WIDTH, bias=False)
        self.to_out = nn.Linear(heads * HEAD_WIDTH, width, bias=False)
        up = nn.Linear(width, 2 * inner, bias=False)
        self.ff = nn.Sequential(up, *_feed_forward_out(inner, width))

    def forward(self, x: Tensor, context: Tensor, hidden: Tensor) -> Tensor:
        """Map tokens (B, N, D) with context (B, L, D) of which `hidden` (B, L) is not seen."""
        x = self.norm(x)
        queries = self.to_q(x).unflatten(-1, (-1, HEAD_WIDTH))
        keys, values = self.to_kv(context).chunk(2, dim=-1)
        mixed: Tensor = self.to_out(_attend(queries, keys, values, hidden)) + self.ff(x)
        return mixed


class Rotary(nn.Module):
    """Rotary positions of queries and keys."""

    def __init__(self) -> None:
        """Compute the frequencies."""
        super().__init__()
        exponents = torch.arange(0, HEAD_WIDTH, 2).float() / HEAD_WIDTH
        self.register_buffer("inv_freq", 10_000.0**-exponents)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate (B, N, ..., d) by its place n; pairs are i and i + d/2."""
        frequencies = self.get_buffer("inv_freq").to(x.device)
        frequencies = frequencies.float() if frequencies.element_size() < 4 else frequencies
        places = torch.arange(x.shape[1], device=x.device, dtype=frequencies.dtype)
        angles = (places[:, None] * frequencies).repeat(1, 2)
        angles = angles.reshape(x.shape[1], *[1] * (x.ndim - 3), HEAD_WIDTH)
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return x * angles.cos().to(x.dtype) + turned * angles.sin().to(x.dtype)


class SelfAttention(nn.Module):
    """Attention of image tokens to each other beside a feed-forward layer, from one projection."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        """Build the layers."""
        super().__init__()
        self.widths = [heads * HEAD_WIDTH, HEAD_WIDTH, HEAD_WIDTH, 2 * inner]
        self.norm = Norm(width)
        self.rotary_emb = Rotary()
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.widths), bias=False)
        self.attn_out = nn.Linear(heads * HEAD_WIDTH, width, bias=False)
        self.ff_out = nn.Sequential(*_feed_forward_out(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, D)."""
        fused = self.fused_attn_ff_proj(self.norm(x))
        queries, keys, values, wide = fused.split(self.widths, dim=-1)
        queries = self.rotary_emb(queries.unflatten(-1, (-1, HEAD_WIDTH)))
        attended = _attend(queries, self.rotary_emb(keys), values, None)
        mixed: Tensor = self.attn_out(attended) + self.ff_out(wide)
        return mixed


class Residual(nn.Module):
    """A layer under the name `fn`."""

    def __init__(self, fn: nn.Module) -> None:
        """Hold the layer."""
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """Add what the layer makes to its input."""
        output: Tensor = x + self.fn(x, *context)
        return output


class CrossModel(nn.Module):
    """Pairs of cross- and self-attention."""

    def __init__(self, width: int, heads: int, inner: int, depth: int) -> None:
        """Build the layers."""
        super().__init__()
        self.width = width
        kinds = (CrossAttention, SelfAttention)
        self.layers = nn.ModuleList(
            nn.ModuleList(Residual(kind(width, heads, inner)) for kind in kinds)
            for _ in range(depth)
        )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], where: object) -> Self:
        """Build the layers that `tensors` hold.

        Raises:
            InputError: naming `where`, if weights are missing or do not fit.
        """
        queries = tensors.get("layers.0.0.fn.to_q.weight")
        inner = tensors.get("layers.0.0.fn.ff.2.weight")
        if queries is None or queries.ndim != 2 or inner is None or inner.ndim != 2:
            raise InputError(f"{where} has no weights of MPS (cross_model.layers.*)")
        depth = len({name.split(".")[1] for name in tensors if name.startswith("layers.")})
        heads = queries.shape[0] // HEAD_WIDTH
        model = cls(queries.shape[1], heads, inner.shape[1], depth)
        load_into(model, tensors, where)
        return model

    def forward(self, x: Tensor, context: Tensor, hidden: Tensor) -> Tensor:
        """Map image tokens (B, N, D) with words (B, L, D) of which `hidden` (B, L) is not seen."""
        for pair in self.layers:
            assert isinstance(pair, nn.ModuleList)
            across, within = pair
            x = within(across(x, context, hidden))
        return x
