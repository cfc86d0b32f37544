"""Log-probabilities of tokens, and the ways to add them up: masks, weights, lengths.

Positions: `labels` (B, L) hold the token ids of a sequence where they belong to the response and
`IGNORE` elsewhere (prompt, image placeholders, padding). A causal model at position t predicts the
token at t + 1, so tables of token log-probs are (B, L - 1): column t belongs to `labels[:, t + 1]`.
Values outside the response are 0. V is the size of the vocabulary, D the width of hidden states, N
a number of response positions.

Log-sum-exp, sums and means run in float32 at least, whatever the dtype of the model.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

IGNORE = -100
"""The label of positions that are not part of a response."""


class TokenLogps(NamedTuple):
    """Log-probs of the tokens of B sequences.

    Attributes:
        logps: (B, L), 0 outside the response.
        mask: (B, L) bool, true on response tokens.
        changed: (B, L) bool, true on response tokens in which the answers of a pair differ.
    """

    logps: Tensor
    mask: Tensor
    changed: Tensor | None = None


def response_mask(labels: Tensor) -> Tensor:
    """Mark the columns of a token table that hold response tokens, (B, L - 1) bool."""
    return labels[:, 1:] != IGNORE


def token_logps(logits: Tensor, labels: Tensor) -> TokenLogps:
    """Compute log p(token) of each response token from full logits.

    Args:
        logits: (B, L, V), raw; position t predicts token t + 1.
        labels: (B, L) int64, `IGNORE` outside the response.

    Raises:
        ValueError: If the shapes do not match.
    """
    if logits.shape[:2] != labels.shape or labels.ndim != 2:
        raise ValueError(
            f"logits must be (B, L, V) and labels (B, L), got {tuple(logits.shape)}"
            f" and {tuple(labels.shape)}"
        )
    mask = response_mask(labels)
    values = _pick(logits[:, :-1][mask], labels[:, 1:][mask])
    return TokenLogps(_scatter(values, mask), mask)


def response_logps(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_size: int = 1024,
) -> TokenLogps:
    """Compute log p(token) of each response token from hidden states and the language-model head.

    Logits exist only for response positions, `chunk_size` of them at a time.

    Args:
        hidden: last hidden states (B, L, D), after the final norm.
        labels: (B, L) int64, `IGNORE` outside the response.
        weight: the head's weight (V, D).
        bias: the head's bias (V,).
        chunk_size: positions whose logits exist at once.
    """
    mask = response_mask(labels)
    values = head_logps(
        hidden[:, :-1][mask], labels[:, 1:][mask], weight, bias=bias, chunk_size=chunk_size
    )
    return TokenLogps(_scatter(values, mask), mask)


def head_logps(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_size: int = 1024,
) -> Tensor:
    """Compute log softmax(hidden W^T + bias)[target] in chunks, (N,) float32 at least.

    Gradients are those of the full computation; memory is bounded by one chunk of logits
    (chunk_size, V). With a frozen head the gradient to each hidden state, W[target] - softmax W,
    is taken while its logits exist, so no logits are computed twice; with a trained head every
    chunk is recomputed in the backward pass. Second derivatives exist only with a trained head.

    Args:
        hidden: (N, D).
        targets: (N,) int64.
        weight: (V, D).
        bias: (V,).
        chunk_size: rows of logits that exist at once.

    Raises:
        ValueError: If `chunk_size` is not positive.
    """
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and not trained and hidden.requires_grad:
        result: Tensor = _FrozenHead.apply(hidden, targets, weight, bias, chunk_size)
        return result
    parts = [
        _maybe_checkpoint(_chunk_logps, hidden[rows], targets[rows], weight, bias)
        for rows in _chunks(len(hidden), chunk_size)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=_wide(hidden.dtype))


def head_kl(
    policy_hidden: Tensor,
    ref_hidden: Tensor,
    policy_weight: Tensor,
    ref_weight: Tensor,
    *,
    chunk_size: int = 512,
) -> Tensor:
    """Compute KL(reference || policy) over the vocabulary at each position, (N,), in chunks.

    This is the position KL of TDPO (Zeng et al. 2024, arXiv 2404.11999) and CHiP. The reference is
    a constant. Both hidden states are (N, D) at the same response positions, both weights (V, D).
    """
    ref_hidden = ref_hidden.detach()
    parts = [
        _maybe_checkpoint(
            _chunk_kl, policy_hidden[rows], ref_hidden[rows], policy_weight, ref_weight
        )
        for rows in _chunks(len(policy_hidden), chunk_size)
    ]
    if not parts:
        return policy_hidden.new_zeros(0, dtype=_wide(policy_hidden.dtype))
    return torch.cat(parts)


def response_kl(
    policy_hidden: Tensor,
    ref_hidden: Tensor,
    labels: Tensor,
    policy_weight: Tensor,
    ref_weight: Tensor,
    *,
    chunk_size: int = 512,
) -> Tensor:
    """Sum KL(reference || policy) over the response positions of each sequence, (B,).

    Hidden states are (B, L, D), `labels` (B, L) as everywhere in this module.
    """
    mask = response_mask(labels)
    values = head_kl(
        policy_hidden[:, :-1][mask],
        ref_hidden[:, :-1][mask],
        policy_weight,
        ref_weight,
        chunk_size=chunk_size,
    )
    return _scatter(values, mask).sum(1)


@torch.no_grad()
def argmax_labels(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_size: int = 1024,
) -> Tensor:
    """Replace each response token in the labels by the likeliest one at its place, (B, L).

    With the hidden states of a noised image, `response_logps(clean_hidden, argmax_labels(...))` is
    POVID's own answer of the model, scored on the clean image. Arguments as in `response_logps`.
    """
    mask = response_mask(labels)
    rows = hidden[:, :-1][mask]
    best = [
        torch.nn.functional.linear(rows[chunk], weight, bias).argmax(1)
        for chunk in _chunks(len(rows), chunk_size)
    ]
    new = labels.clone()
    if best:
        new[:, 1:][mask] = torch.cat(best)
    return new


def lengths(mask: Tensor) -> Tensor:
    """Count response tokens, (B,) int64."""
    return mask.sum(1)


def sum_logps(tokens: TokenLogps, weights: Tensor | None = None) -> Tensor:
    """Sum log-probs over the response, each times its weight if there are any, (B,)."""
    logps = tokens.logps.to(_wide(tokens.logps.dtype))
    if weights is not None:
        logps = logps * weights.to(logps)
    return (logps * tokens.mask).sum(1)


def mean_logps(tokens: TokenLogps, weights: Tensor | None = None) -> Tensor:
    """Average log-probs over the response: weighted sum over sum of weights, (B,).

    Raises:
        ValueError: If a response is empty or all its weights are 0.
    """
    ones = tokens.mask.to(_wide(tokens.logps.dtype))
    total = (ones if weights is None else ones * weights.to(ones)).sum(1)
    if not bool((total > 0).all()):
        raise ValueError("the mean log-prob of an empty response is undefined")
    return sum_logps(tokens, weights) / total


def desensitised_weights(mask: Tensor, public_lengths: Tensor, alpha: float) -> Tensor:
    """Weight response tokens by 1 up to the public length and by `alpha` after it, (B, L).

    LD-DPO (Liu et al. 2024, arXiv 2409.06411): with `public_lengths` the shorter length of each
    pair, the excess of the longer answer counts for less. `alpha` 1 changes nothing, 0 ignores the
    excess.

    Args:
        mask: response tokens (B, L) bool.
        public_lengths: (B,) in tokens.
        alpha: in [0, 1].

    Raises:
        ValueError: If `alpha` is out of range.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"ld_alpha must be in [0, 1], got {alpha}")
    position = mask.cumsum(1)
    excess = position > public_lengths[:, None]
    return torch.where(excess, alpha, 1.0) * mask


def changed_tokens(
    rejected: Sequence[int], chosen: Sequence[int], *, min_match: int = 3, strict: bool = False
) -> tuple[list[int], list[int]]:
    """Find the tokens in which two answers differ, as positions in `rejected` and in `chosen`.

    RLHF-V (Yu et al. 2023, arXiv 2312.00849, section 3.2): matching blocks of Python's difflib, of
    which those shorter than `min_match` do not count as matches.

    Args:
        rejected: token ids of the rejected answer.
        chosen: token ids of the chosen answer.
        min_match: shortest run of equal tokens that counts as unchanged.
        strict: do as the authors' code does, where a span counts as changed only if it is non-empty
            on both sides, so that pure insertions and deletions do not, and where difflib ignores
            frequent tokens of answers of 200 tokens or more.
    """
    matcher = difflib.SequenceMatcher(None, rejected, chosen, autojunk=strict)
    *blocks, end = matcher.get_matching_blocks()
    positions: tuple[list[int], list[int]] = ([], [])
    at_rejected = at_chosen = 0
    for block in [*(b for b in blocks if b.size >= min_match), end]:
        spans = range(at_rejected, block.a), range(at_chosen, block.b)
        if not strict or all(len(span) for span in spans):
            for found, span in zip(positions, spans, strict=True):
                found.extend(span)
        at_rejected, at_chosen = block.a + block.size, block.b + block.size
    return positions


def changed_mask(mask: Tensor, changed: Sequence[Sequence[int]]) -> Tensor:
    """Mark changed response tokens, (B, L) bool.

    Args:
        mask: response tokens (B, L) bool.
        changed: for each row, positions of `changed_tokens` counted from its first response token.

    Raises:
        ValueError: If a position lies outside its response.
    """
    marked = torch.zeros_like(mask)
    for row, positions in enumerate(changed):
        columns = mask[row].nonzero()[:, 0]
        if positions and max(positions) >= len(columns):
            raise ValueError(f"position {max(positions)} in a response of {len(columns)} tokens")
        marked[row, columns[list(positions)]] = True
    return marked


def align_left(tokens: TokenLogps) -> TokenLogps:
    """Move the response tokens of each row to its front, and cut the table to the longest, (B, T).

    Afterwards column t is the t-th response token of every row.
    """
    order = tokens.mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    width = int(lengths(tokens.mask).max()) if tokens.mask.numel() else 0
    moved = [None if t is None else t.gather(1, order)[:, :width] for t in tokens]
    logps, mask, changed = moved
    assert logps is not None
    assert mask is not None
    return TokenLogps(logps * mask, mask, changed)


class _FrozenHead(torch.autograd.Function):
    """Log-probs through a head without gradient: one pass, the gradient taken on the way."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, size: int
    ) -> Tensor:
        wide = _wide(hidden.dtype)
        logps = hidden.new_empty(len(hidden), dtype=wide)
        slopes = torch.empty_like(hidden)
        for rows in _chunks(len(hidden), size):
            logits = torch.nn.functional.linear(hidden[rows], weight, bias).to(wide)
            ids = targets[rows]
            top = logits.amax(1, keepdim=True)
            picked = logits.gather(1, ids[:, None]) - top
            # In place of the logits: logits may be the largest tensor of the whole step.
            odds = logits.sub_(top).exp_()
            total = odds.sum(1, keepdim=True)
            logps[rows] = (picked - total.log())[:, 0]
            slopes[rows] = (weight[ids] - (odds.to(weight.dtype) @ weight) / total).to(slopes.dtype)
        ctx.save_for_backward(slopes)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return grad[:, None].to(slopes.dtype) * slopes, None, None, None, None


def _chunks(count: int, size: int) -> list[slice]:
    if size < 1:
        raise ValueError(f"chunk_size must be positive, got {size}")
    return [slice(start, start + size) for start in range(0, count, size)]


def _chunk_logps(hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _pick(torch.nn.functional.linear(hidden, weight, bias), targets)


def _chunk_kl(policy: Tensor, ref: Tensor, policy_weight: Tensor, ref_weight: Tensor) -> Tensor:
    wide = _wide(policy.dtype)
    policy_logps = torch.nn.functional.linear(policy, policy_weight).to(wide).log_softmax(1)
    with torch.no_grad():
        ref_logps = torch.nn.functional.linear(ref, ref_weight).to(wide).log_softmax(1)
    return (ref_logps.exp() * (ref_logps - policy_logps)).sum(1)


def _maybe_checkpoint(function: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
    """Recompute `function` in the backward pass, if there will be one."""
    if torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in args):
        result: Tensor = checkpoint(function, *args, use_reentrant=False)
        return result
    return function(*args)


def _pick(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute log softmax(logits)[target] row by row, (N,)."""
    wide = logits.to(_wide(logits.dtype))
    return wide.gather(1, targets[:, None])[:, 0] - wide.logsumexp(1)


def _scatter(values: Tensor, mask: Tensor) -> Tensor:
    table = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    return table.masked_scatter(mask, values)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
