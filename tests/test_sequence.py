from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mmalign import sequence
from mmalign.sequence import IGNORE, TokenLogps

GOLDEN_LOGITS = 3 * torch.sin(torch.arange(70, dtype=torch.float64)).reshape(2, 5, 7)
GOLDEN_LABELS = torch.tensor([[IGNORE, IGNORE, 1, 2, 3], [IGNORE, 4, 5, 6, IGNORE]])


def waves(*shape: int, phase: float = 0.0) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.sin(0.7 * torch.arange(count, dtype=torch.float64) + phase).reshape(shape)


HIDDEN = waves(2, 5, 4)
WEIGHT = waves(7, 4, phase=1.0)
BIAS = waves(7, phase=2.0)


def test_reference_numbers_of_summed_and_average_log_probs() -> None:
    tokens = sequence.token_logps(GOLDEN_LOGITS, GOLDEN_LABELS)
    assert sequence.sum_logps(tokens).tolist() == pytest.approx([-11.6558, -10.0145], abs=5e-5)
    assert sequence.mean_logps(tokens).tolist() == pytest.approx([-3.8853, -3.3382], abs=5e-5)
    assert tokens.mask.tolist() == [[False, True, True, True], [True, True, True, False]]


def test_column_t_is_the_token_after_position_t() -> None:
    tokens = sequence.token_logps(GOLDEN_LOGITS, GOLDEN_LABELS)
    row = GOLDEN_LOGITS[1, 0].tolist()
    want = row[4] - math.log(sum(math.exp(x) for x in row))
    assert tokens.logps[1, 0].item() == pytest.approx(want)


def test_prompt_positions_do_not_matter() -> None:
    noise = torch.where(GOLDEN_LABELS.roll(-1, 1)[..., None] == IGNORE, 100.0, 0.0)
    noise[:, -1] = 100.0
    got = sequence.token_logps(GOLDEN_LOGITS + noise, GOLDEN_LABELS)
    assert_close(got.logps, sequence.token_logps(GOLDEN_LOGITS, GOLDEN_LABELS).logps)


def test_shapes_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="labels"):
        sequence.token_logps(GOLDEN_LOGITS, GOLDEN_LABELS[:, 1:])


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
@pytest.mark.parametrize("trained", [(), ("weight",), ("bias",), ("weight", "bias")])
def test_chunks_equal_full_logits_in_value_and_gradient(
    chunk_size: int, trained: tuple[str, ...]
) -> None:
    def gradients(chunked: bool) -> list[Tensor | None]:
        hidden = HIDDEN.clone().requires_grad_()
        weight = WEIGHT.clone().requires_grad_("weight" in trained)
        bias = BIAS.clone().requires_grad_("bias" in trained)
        if chunked:
            tokens = sequence.response_logps(
                hidden, GOLDEN_LABELS, weight, bias=bias, chunk_size=chunk_size
            )
        else:
            logits = torch.nn.functional.linear(hidden, weight, bias)
            tokens = sequence.token_logps(logits, GOLDEN_LABELS)
        (waves(2, 4, phase=3.0) * tokens.logps).sum().backward()
        return [tokens.logps, hidden.grad, weight.grad, bias.grad]

    for got, want in zip(gradients(True), gradients(False), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            assert_close(got, want)


@pytest.mark.parametrize("trained", [False, True])
def test_gradcheck_of_the_head(trained: bool) -> None:
    targets = torch.tensor([1, 0, 6])
    hidden = waves(3, 4).requires_grad_()
    weight = WEIGHT.clone().requires_grad_(trained)
    assert torch.autograd.gradcheck(
        lambda h, w: sequence.head_logps(h, targets, w, chunk_size=2), (hidden, weight)
    )


@pytest.mark.parametrize("trained", [False, True])
def test_no_more_logits_exist_than_a_chunk(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    linear = torch.nn.functional.linear

    def counting(inputs: Tensor, *args: Tensor | None) -> Tensor:
        rows.append(len(inputs))
        return linear(inputs, *args)

    monkeypatch.setattr(torch.nn.functional, "linear", counting)
    saved: list[torch.Size] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.shape)
        return tensor

    hidden = waves(10, 4).requires_grad_()
    weight = WEIGHT.clone().requires_grad_(trained)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logps = sequence.head_logps(hidden, torch.arange(10) % 7, weight, chunk_size=3)
    assert all(shape[-1:] != (7,) for shape in saved)
    logps.sum().backward()
    assert max(rows) == 3
    # A frozen head needs its logits once, a trained one again in the backward pass.
    assert sum(rows) == (20 if trained else 10)


def test_half_precision_is_added_up_in_float32() -> None:
    hidden, weight = HIDDEN.bfloat16().requires_grad_(), WEIGHT.bfloat16()
    tokens = sequence.response_logps(hidden, GOLDEN_LABELS, weight)
    assert tokens.logps.dtype == torch.float32
    logits = torch.nn.functional.linear(hidden, weight).float()
    want = sequence.token_logps(logits, GOLDEN_LABELS)
    assert_close(tokens.logps, want.logps, rtol=0, atol=1e-6)
    sequence.sum_logps(tokens).sum().backward()
    assert hidden.grad.dtype == torch.bfloat16


def test_a_batch_without_response_tokens_is_empty() -> None:
    labels = torch.full((2, 5), IGNORE)
    tokens = sequence.response_logps(HIDDEN.clone().requires_grad_(), labels, WEIGHT)
    assert not tokens.mask.any()
    assert not tokens.logps.any()
    with torch.no_grad():
        assert len(sequence.head_logps(HIDDEN[0, :0], labels[0, :0], WEIGHT)) == 0
    with pytest.raises(ValueError, match="empty"):
        sequence.mean_logps(tokens)
    with pytest.raises(ValueError, match="chunk_size"):
        sequence.head_logps(HIDDEN[0], labels[0], WEIGHT, chunk_size=0)


@pytest.mark.parametrize("chunk_size", [1, 100])
def test_argmax_replaces_response_tokens_alone(chunk_size: int) -> None:
    got = sequence.argmax_labels(HIDDEN, GOLDEN_LABELS, WEIGHT, bias=BIAS, chunk_size=chunk_size)
    best = (HIDDEN @ WEIGHT.T + BIAS).argmax(-1)
    want = [
        [IGNORE, IGNORE, best[0, 1], best[0, 2], best[0, 3]],
        [IGNORE, best[1, 0], best[1, 1], best[1, 2], IGNORE],
    ]
    assert got.tolist() == want
    assert got.tolist() != GOLDEN_LABELS.tolist()
    nothing = torch.full((2, 5), IGNORE)
    assert torch.equal(sequence.argmax_labels(HIDDEN, nothing, WEIGHT), nothing)


@pytest.mark.parametrize("chunk_size", [2, 100])
def test_token_kl_equals_its_definition(chunk_size: int) -> None:
    policy = HIDDEN.clone().requires_grad_()
    other = waves(2, 5, 4, phase=0.3)
    got = sequence.response_kl(
        policy, other, GOLDEN_LABELS, WEIGHT, WEIGHT + 0.1, chunk_size=chunk_size
    )
    want = torch.zeros(2, dtype=torch.float64)
    for row, position in sequence.response_mask(GOLDEN_LABELS).nonzero().tolist():
        p = ((WEIGHT + 0.1) @ other[row, position]).softmax(0)
        q = (WEIGHT @ policy[row, position]).softmax(0)
        want[row] += (p * (p / q).log()).sum()
    assert_close(got, want)
    grads = [torch.autograd.grad(v.sum(), policy, retain_graph=True)[0] for v in (got, want)]
    assert_close(*grads)


def test_token_kl_of_equal_networks_is_nothing() -> None:
    policy = HIDDEN.clone().requires_grad_()
    kl = sequence.response_kl(policy, HIDDEN, GOLDEN_LABELS, WEIGHT, WEIGHT)
    kl.sum().backward()
    assert_close(kl, torch.zeros_like(kl), atol=1e-14, rtol=0)
    assert_close(policy.grad, torch.zeros_like(policy), atol=1e-14, rtol=0)
    assert len(sequence.head_kl(HIDDEN[0, :0], HIDDEN[0, :0], WEIGHT, WEIGHT)) == 0


TABLE = TokenLogps(
    torch.tensor([[0.0, -1.0, -2.0, -4.0], [-3.0, 0.0, -5.0, -7.0]], dtype=torch.float64),
    torch.tensor([[False, True, True, True], [True, False, True, True]]),
)


def test_weighted_sums_and_means() -> None:
    weights = torch.tensor([[9.0, 1.0, 5.0, 1.0], [1.0, 9.0, 1.0, 1.0]])
    assert sequence.sum_logps(TABLE, weights).tolist() == [-15, -15]
    assert sequence.mean_logps(TABLE, weights).tolist() == [-15 / 7, -5]
    assert sequence.lengths(TABLE.mask).tolist() == [3, 3]


def test_tokens_beyond_the_public_length_weigh_less() -> None:
    weights = sequence.desensitised_weights(TABLE.mask, torch.tensor([1, 3]), alpha=0.5)
    assert weights.tolist() == [[0, 1, 0.5, 0.5], [1, 0, 1, 1]]
    assert sequence.sum_logps(TABLE, weights).tolist() == [-4, -15]
    whole = sequence.desensitised_weights(TABLE.mask, torch.tensor([1, 1]), alpha=1.0)
    assert_close(sequence.sum_logps(TABLE, whole), sequence.sum_logps(TABLE))
    with pytest.raises(ValueError, match="ld_alpha"):
        sequence.desensitised_weights(TABLE.mask, torch.tensor([1, 1]), alpha=1.5)


def test_responses_are_lined_up_on_the_left() -> None:
    changed = torch.tensor([[False, False, False, True], [True, False, False, False]])
    moved = sequence.align_left(TABLE._replace(changed=changed))
    assert moved.logps.tolist() == [[-1, -2, -4], [-3, -5, -7]]
    assert moved.mask.all()
    assert moved.changed.tolist() == [[False, False, True], [True, False, False]]
    assert sequence.align_left(
        TokenLogps(TABLE.logps[:, :2], TABLE.mask[:, :2])
    ).logps.tolist() == [
        [-1],
        [-3],
    ]


@pytest.mark.parametrize(
    ("rejected", "chosen", "strict", "want"),
    [
        ([1, 2, 3, 9, 9, 4, 5, 6], [1, 2, 3, 7, 4, 5, 6], True, ([3, 4], [3])),
        ([1, 2, 3, 9, 9, 4, 5, 6], [1, 2, 3, 7, 4, 5, 6], False, ([3, 4], [3])),
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 8, 4, 5, 6], True, ([], [])),
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 8, 4, 5, 6], False, ([], [3])),
        ([1, 2, 3, 8, 4, 5, 6], [1, 2, 3, 4, 5, 6], False, ([3], [])),
        # A match of two tokens is too short to split the changed span.
        ([1, 2, 3, 9, 4, 5, 8], [1, 2, 3, 7, 4, 5, 6], True, ([3, 4, 5, 6], [3, 4, 5, 6])),
        ([1, 2, 3], [1, 2, 3], False, ([], [])),
        ([1, 2], [3], True, ([0, 1], [0])),
        ([], [3], False, ([], [0])),
    ],
)
def test_changed_tokens(
    rejected: list[int], chosen: list[int], strict: bool, want: tuple[list[int], list[int]]
) -> None:
    assert sequence.changed_tokens(rejected, chosen, strict=strict) == want


def test_frequent_tokens_of_long_answers_are_matched_unless_strict() -> None:
    start, middle, end = list(range(100, 200)), [5] * 6, list(range(200, 300))
    rejected, chosen = [*start, 1, *middle, 2, *end], [*start, 3, *middle, 4, *end]
    assert sequence.changed_tokens(rejected, chosen) == ([100, 107], [100, 107])
    both = list(range(100, 108))
    assert sequence.changed_tokens(rejected, chosen, strict=True) == (both, both)


def test_changed_positions_count_from_the_first_response_token() -> None:
    marked = sequence.changed_mask(TABLE.mask, [[0, 2], [1]])
    assert marked.tolist() == [[False, True, False, True], [False, False, True, False]]
    assert not sequence.changed_mask(TABLE.mask, [[], []]).any()
    with pytest.raises(ValueError, match="position 3"):
        sequence.changed_mask(TABLE.mask, [[3], []])
