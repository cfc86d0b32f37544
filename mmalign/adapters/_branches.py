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
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mmalign.sequence import head_logps
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


class _Forward:
    """Last hidden states (S, T, D) of the sequences of a forward, and how to read them."""

    def __init__(self, sequences: Sequence[_Sequence], hidden: Tensor) -> None:
        self._sequences, self._hidden = sequences, hidden
        self.targets = torch.cat([s.targets for s in sequences]).to(hidden.device)
        self.lengths = [
            int((s.branch == number).sum())
            for s in sequences
            for number in range(1, int(s.branch.max()) + 1)
        ]

    def picked(self) -> Tensor:
        """Gather the states (N, D) that predict the tokens of all answers in order."""
        rows = [torch.full_like(s.sources, i) for i, s in enumerate(self._sequences)]
        columns = [s.sources for s in self._sequences]
        device = self._hidden.device
        return self._hidden[torch.cat(rows).to(device), torch.cat(columns).to(device)]

    def whole(self) -> list[Tensor]:
        """Gather the states (P + R, D) of the prefix and of each answer."""
        states = []
        for sequence, hidden in zip(self._sequences, self._hidden, strict=True):
            branch = sequence.branch.to(hidden.device)
            own = hidden[: len(branch)]
            states += [
                own[(branch == 0) | (branch == number)]
                for number in range(1, int(branch.max()) + 1)
            ]
        return states


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
        forward = self._run(batch, share_prefix)
        head = output_head(self.model)
        logps = head_logps(
            forward.picked(),
            forward.targets,
            head.weight,
            bias=head.bias,
            chunk_size=self.logits_chunk,
        )
        whole = forward.whole() if states else [None] * len(forward.lengths)
        scored = map(Scored, torch.split(logps, forward.lengths), whole)
        return [[next(scored) for _ in item.answers] for item in batch]

    def embed(self, batch: Sequence[Branches]) -> list[list[Tensor]]:
        """Look up the input embeddings (P + R, D) of each prefix with each of its answers."""
        sequences = self._sequences(batch, share_prefix=False)
        embeds, _ = self._embed(sequences)
        rows = iter(embeds)
        return [
            [next(rows)[: len(item.prefix_ids) + len(answer)] for answer in item.answers]
            for item in batch
        ]

    @torch.no_grad()
    def likeliest(self, batch: Sequence[Branches], share_prefix: bool = True) -> list[list[Tensor]]:
        """Predict the token (R,) at each place of each answer, given the answer's own before it."""
        forward = self._run(batch, share_prefix)
        parts = torch.split(forward.picked(), self.logits_chunk)
        tokens = torch.cat([self._logits(part).argmax(1) for part in parts])
        found = iter(torch.split(tokens, forward.lengths))
        return [[next(found) for _ in item.answers] for item in batch]

    def last_logits(self, batch: Sequence[Branches]) -> Tensor:
        """Compute the logits (B, V) of the token after each prefix, in float32."""
        sequences = self._sequences([item._replace(answers=()) for item in batch], True)
        hidden = self._hidden(sequences)
        last = torch.tensor([len(s.ids) - 1 for s in sequences], device=hidden.device)
        return self._logits(hidden[torch.arange(len(sequences), device=hidden.device), last])

    def _sequences(self, batch: Sequence[Branches], share_prefix: bool) -> list[_Sequence]:
        positions = self.layout.positions
        return [s for item in batch for s in _sequences(item, positions, share_prefix)]

    def _run(self, batch: Sequence[Branches], share_prefix: bool) -> _Forward:
        sequences = self._sequences(batch, share_prefix)
        return _Forward(sequences, self._hidden(sequences))

    def _embed(self, sequences: Sequence[_Sequence]) -> tuple[Tensor, Tensor]:
        """Look up embeddings (S, T, D), images included, and where images are (S, T)."""
        embedding = cast(Any, self.model).get_input_embeddings()
        device = embedding.weight.device
        length = max(len(s.ids) for s in sequences)
        ids = torch.stack([_padded(s.ids, length, 0) for s in sequences]).to(device)
        visual = ids == self.layout.image_token_id
        embeds: Tensor = embedding(ids)
        features = [s.features.embeds for s in sequences if s.features is not None]
        if features:
            images = torch.cat([f.to(device, embeds.dtype) for f in features])
            embeds = embeds.masked_scatter(visual[..., None], images)
        return embeds, visual

    def _hidden(self, sequences: Sequence[_Sequence]) -> Tensor:
        """Run the language model; returns last hidden states (S, T, D)."""
        embeds, visual = self._embed(sequences)
        length, device = embeds.shape[1], embeds.device
        positions = torch.stack([_continued(s.positions, length) for s in sequences], dim=1)
        deep = [s.features.deep for s in sequences if s.features is not None]
        more: dict[str, Any] = {}
        if deep and deep[0]:
            more["visual_pos_masks"] = visual
            levels = zip(*deep, strict=True)
            more["deepstack_visual_embeds"] = [torch.cat(level).to(device) for level in levels]
        output = cast(Any, self.model).model.language_model(
            inputs_embeds=embeds,
            attention_mask=_mask(sequences, length, device),
            position_ids=positions.to(device)[0 if self.layout.flat_positions else slice(None)],
            use_cache=False,
            **more,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        head = output_head(self.model)
        return nn.functional.linear(hidden, head.weight, head.bias).float()


class Head(NamedTuple):
    """The language-model head: weight (V, D) and bias (V,)."""

    weight: Tensor
    bias: Tensor | None


def output_head(model: nn.Module) -> Head:
    """Return the head of a model of transformers."""
    layer: Any = cast(Any, model).get_output_embeddings()
    return Head(layer.weight, layer.bias)


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
