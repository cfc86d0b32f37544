"""Log-probabilities of answers, with their common prefix computed once.

The answers of one prefix are laid out behind it in one sequence. A block mask keeps each from
seeing the others, and each starts at the position after the prefix, so that every token sees
exactly what it would see in a sequence of its own: the result is the same up to rounding, at
P + R1 + R2 tokens instead of 2 P + R1 + R2. Logits exist only where an answer token is predicted,
a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmalign.types import Branches, ImageFeatures, Scored

PADDING = -1
Positions = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""Positions (K, P) of the tokens of a prefix (P,); K is 1, or 3 for temporal, height, width."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What is different between families.

    Attributes:
        image_token_id: stands where a feature of an image goes.
        positions: of a prefix.
        flat_positions: whether the language model takes positions (B, T) rather than (3, B, T).
    """

    image_token_id: int
    positions: Positions
    flat_positions: bool


class _Sequence(NamedTuple):
    """One row of a forward: tokens (T,), positions (K, T), branch of each token (T,).

    `sources` (N,) are the places whose hidden state predicts `targets` (N,).
    """

    ids: Tensor
    positions: Tensor
    branch: Tensor
    sources: Tensor
    targets: Tensor
    features: ImageFeatures | None


class AnswerScorer(nn.Module):
    """Computes log-probabilities of answer tokens with a model of transformers.

    It is the module that accelerate prepares, so its forward is the only way to the policy in a
    distributed run.
    """

    def __init__(self, model: nn.Module, layout: Layout, logits_chunk: int) -> None:
        """Wrap a model.

        Args:
            model: an image-text-to-text model of transformers, loaded with SDPA attention.
            layout: what its family needs.
            logits_chunk: answer positions whose logits exist at the same time.
        """
        super().__init__()
        self.model = model
        self.layout = layout
        self.logits_chunk = logits_chunk

    def forward(
        self, batch: Sequence[Branches], share_prefix: bool = True, states: bool = False
    ) -> list[list[Scored]]:
        """Score every answer of every prefix.

        Args:
            batch: prefixes with their answers; tensors on any device.
            share_prefix: compute each prefix once for all its answers.
            states: return hidden states as well.
        """
        picked, targets = self._answer_states(batch, share_prefix)
        values = [
            self._logps(part, wanted)
            for part, wanted in zip(
                picked.split(self.logits_chunk), targets.split(self.logits_chunk), strict=True
            )
        ]
        logps = _per_answer(torch.cat(values), batch)
        hidden = _per_answer(picked, batch) if states else None
        return [
            [
                Scored(values, None if hidden is None else hidden[i][j])
                for j, values in enumerate(answers)
            ]
            for i, answers in enumerate(logps)
        ]

    @torch.no_grad()
    def likeliest(self, batch: Sequence[Branches], share_prefix: bool = True) -> list[list[Tensor]]:
        """Predict the token (R,) at each place of each answer, given the answer's own before it."""
        picked, _ = self._answer_states(batch, share_prefix)
        tokens = [self._head(part).argmax(1) for part in picked.split(self.logits_chunk)]
        return _per_answer(torch.cat(tokens), batch)

    def last_logits(self, batch: Sequence[Branches]) -> Tensor:
        """Compute the logits (B, V) of the token after each prefix, in float32."""
        sequences = [
            next(_sequences(item._replace(answers=()), self.layout.positions, True))
            for item in batch
        ]
        hidden = self._hidden(sequences)
        last = torch.tensor([len(s.ids) - 1 for s in sequences], device=hidden.device)
        picked = hidden[torch.arange(len(sequences), device=hidden.device), last]
        return self._head(picked).float()

    def _answer_states(
        self, batch: Sequence[Branches], share_prefix: bool
    ) -> tuple[Tensor, Tensor]:
        """Run the model: hidden states (N, D) that predict answer tokens, and these tokens (N,)."""
        sequences = [
            sequence
            for item in batch
            for sequence in _sequences(item, self.layout.positions, share_prefix)
        ]
        hidden = self._hidden(sequences)
        rows = torch.cat([torch.full_like(s.sources, i) for i, s in enumerate(sequences)])
        columns = torch.cat([s.sources for s in sequences])
        targets = torch.cat([s.targets for s in sequences]).to(hidden.device)
        return hidden[rows.to(hidden.device), columns.to(hidden.device)], targets

    def _hidden(self, sequences: Sequence[_Sequence]) -> Tensor:
        """Run the language model; returns last hidden states (S, T, D)."""
        model: Any = self.model
        embedding = model.get_input_embeddings()
        device = embedding.weight.device
        length = max(len(s.ids) for s in sequences)
        ids = torch.stack([_padded(s.ids, length, 0) for s in sequences]).to(device)
        positions = torch.stack([_continued(s.positions, length) for s in sequences], dim=1)
        visual = ids == self.layout.image_token_id
        embeds = embedding(ids)
        features = [s.features for s in sequences if s.features is not None]
        more: dict[str, Any] = {}
        if features:
            images = torch.cat([f.embeds.to(device, embeds.dtype) for f in features])
            embeds = embeds.masked_scatter(visual[..., None], images)
            if features[0].deep:
                more["visual_pos_masks"] = visual
                more["deepstack_visual_embeds"] = [
                    torch.cat([level.to(device) for level in levels])
                    for levels in zip(*(f.deep for f in features), strict=True)
                ]
        output = model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=_mask(sequences, length, device),
            position_ids=positions.to(device)[0 if self.layout.flat_positions else slice(None)],
            use_cache=False,
            **more,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _head(self, hidden: Tensor) -> Tensor:
        model: Any = self.model
        logits: Tensor = model.get_output_embeddings()(hidden)
        return logits

    def _logps(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Score tokens (N,) at hidden states (N, D); logits are computed again in the backward."""
        if not (torch.is_grad_enabled() and hidden.requires_grad):
            return self._chunk_logps(hidden, targets)
        result: Tensor = checkpoint(self._chunk_logps, hidden, targets, use_reentrant=False)
        return result

    def _chunk_logps(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self._head(hidden).float()
        return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)


def _sequences(item: Branches, positions: Positions, share_prefix: bool) -> Iterator[_Sequence]:
    prefix = item.prefix_ids.cpu()
    tensors = {} if item.features is None else item.features.tensors
    start = positions(prefix, tensors).cpu()
    answers = [answer.cpu() for answer in item.answers]
    groups = [answers] if share_prefix or not answers else [[answer] for answer in answers]
    for group in groups:
        yield _lay_out(prefix, start, group, item.features)


def _lay_out(
    prefix: Tensor, start: Tensor, answers: Sequence[Tensor], features: ImageFeatures | None
) -> _Sequence:
    """Put answers behind a prefix whose positions are `start` (K, P)."""
    first = int(start.max()) + 1
    lengths = [len(answer) for answer in answers]
    offsets = accumulate(lengths, initial=len(prefix))
    sources = [
        torch.cat([torch.tensor([len(prefix) - 1]), torch.arange(offset, offset + size - 1)])
        for offset, size in zip(offsets, lengths, strict=False)
    ]
    tails = [(first + torch.arange(size)).expand(len(start), -1) for size in lengths]
    branch = [torch.full((size,), number) for number, size in enumerate([len(prefix), *lengths])]
    none = torch.empty(0, dtype=torch.long)
    return _Sequence(
        ids=torch.cat([prefix, *answers]),
        positions=torch.cat([start, *tails], dim=1),
        branch=torch.cat(branch),
        sources=torch.cat([none, *sources]),
        targets=torch.cat([none, *answers]),
        features=features,
    )


def _mask(sequences: Sequence[_Sequence], length: int, device: torch.device) -> Tensor | None:
    """Say who sees whom, (S, 1, T, T); None where plain causal attention says the same.

    Padding stands at the end, where nothing before it looks.
    """
    if all(int(s.branch.max()) <= 1 for s in sequences):
        return None
    branch = torch.stack([_padded(s.branch, length, PADDING) for s in sequences]).to(device)
    query, key = branch[:, :, None], branch[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return (((key == 0) | (key == query)) & causal)[:, None]


def _padded(values: Tensor, length: int, fill: int) -> Tensor:
    return nn.functional.pad(values, (0, length - len(values)), value=fill)


def _continued(positions: Tensor, length: int) -> Tensor:
    """Count on behind the end, (K, T): a jump would look like a second sequence."""
    missing = length - positions.shape[1]
    return torch.cat([positions, positions[:, -1:] + 1 + torch.arange(missing)], dim=1)


def _per_answer(values: Tensor, batch: Sequence[Branches]) -> list[list[Tensor]]:
    parts = iter(values.split([len(answer) for item in batch for answer in item.answers]))
    return [[next(parts) for _ in item.answers] for item in batch]
