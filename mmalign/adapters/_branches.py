"""Log-probabilities of answers, with what they have in common computed once.

Logits exist only where an answer token is predicted, a chunk at a time, and the last layer works
only there, apart from the keys and values that are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from mmalign.adapters._attention import Forest, no_mask, use_forests
from mmalign.adapters._packing import Layout, Packed, Path, Sharing, pack
from mmalign.sequence import head_logps
from mmalign.types import Branches, Scored

SEPARATE = Sharing(prefixes=False)
T = TypeVar("T")


class Head(NamedTuple):
    """The language-model head: weight (V, D) and bias (V,)."""

    weight: Tensor
    bias: Tensor | None


class Whole:
    """Hides prefixes from DistributedDataParallel.

    It would move them to its device and make new objects of them, of which nothing tells any more
    that they share images.
    """

    def __init__(self, batch: Sequence[Branches]) -> None:
        """Hold prefixes with their answers."""
        self.batch = batch


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
        use_forests(self._language_model)
        self.train(model.training)  # a trainer that looks at this module alone must not be misled

    def forward(
        self, given: Sequence[Branches] | Whole, sharing: Sharing = SEPARATE, states: bool = False
    ) -> list[list[Scored]]:
        """Score every answer of every prefix.

        Args:
            given: prefixes with their answers; tensors on any device.
            sharing: what is computed once.
            states: return hidden states as well.
        """
        batch = given.batch if isinstance(given, Whole) else given
        packed = pack(batch, self.layout, sharing)
        hidden = self._hidden(packed, everywhere=states)
        head = output_head(self.model)
        logps = head_logps(
            _picked(packed, hidden),
            _targets(packed).to(hidden.device),
            head.weight,
            bias=head.bias,
            chunk_size=self.logits_chunk,
        )
        sizes = [path.size for path in _paths(packed)]
        whole = _whole(packed, hidden) if states else [None] * len(sizes)
        scored = map(Scored, torch.split(logps, sizes), whole)
        return _in_order(packed, list(scored), batch)

    def embed(self, batch: Sequence[Branches]) -> list[list[Tensor]]:
        """Look up the input embeddings (P + R, D) of each prefix with each of its answers."""
        packed = pack(batch, self.layout, SEPARATE)
        embeds, _ = self._embed(packed)
        return _in_order(packed, _whole(packed, embeds), batch)

    @torch.no_grad()
    def likeliest(self, batch: Sequence[Branches]) -> list[list[Tensor]]:
        """Predict the token (R,) at each place of each answer, given the answer's own before it."""
        packed = pack(batch, self.layout, SEPARATE)
        picked = _picked(packed, self._hidden(packed))
        parts = torch.split(picked, self.logits_chunk)
        tokens = torch.cat([self._logits(part).argmax(1) for part in parts])
        sizes = [path.size for path in _paths(packed)]
        return _in_order(packed, list(torch.split(tokens, sizes)), batch)

    def last_logits(self, batch: Sequence[Branches], sharing: Sharing = SEPARATE) -> Tensor:
        """Compute the logits (B, V) of the token after each prefix, in float32."""
        # The token that is predicted has no influence; any but that of an image will do.
        asked = [item._replace(answers=(item.prefix_ids[-1:],)) for item in batch]
        packed = pack(asked, self.layout, sharing)
        states = _picked(packed, self._hidden(packed))
        ordered = _in_order(packed, list(states), batch=asked)
        return self._logits(torch.stack([state for (state,) in ordered]))

    @property
    def _language_model(self) -> Any:
        return cast(Any, self.model).model.language_model

    def _embed(self, packed: Sequence[Packed]) -> tuple[Tensor, Tensor]:
        """Look up embeddings (T, D) of all sequences, images included, and where images are."""
        embedding = cast(Any, self.model).get_input_embeddings()
        device = embedding.weight.device
        ids = torch.cat([sequence.ids for sequence in packed]).to(device)
        visual = ids == self.layout.image_token_id
        embeds: Tensor = embedding(ids)
        features = [s.features.embeds for s in packed if s.features is not None]
        if features:
            images = torch.cat([f.to(device, embeds.dtype) for f in features])
            embeds = embeds.masked_scatter(visual[:, None], images)
        return embeds, visual

    def _hidden(self, packed: Sequence[Packed], *, everywhere: bool = False) -> Tensor:
        """Run the language model; returns last hidden states (T, D) of all sequences.

        They are right where an answer token is predicted, and with `everywhere` at every token.
        """
        embeds, visual = self._embed(packed)
        device = embeds.device
        positions = torch.cat([sequence.positions for sequence in packed], dim=1)[:, None]
        deep = [s.features.deep for s in packed if s.features is not None]
        more: dict[str, Any] = {}
        if deep and deep[0]:
            more["visual_pos_masks"] = visual[None]
            levels = zip(*deep, strict=True)
            more["deepstack_visual_embeds"] = [torch.cat(level).to(device) for level in levels]
        last = self._language_model.layers[-1]
        in_part = not everywhere and not _recomputes(last)
        needed = _needed(packed).to(device) if in_part else None
        number = len(self._language_model.layers) - 1 if in_part else None
        with _working_where(last, needed):
            output = self._language_model(
                inputs_embeds=embeds[None],
                attention_mask=no_mask(device),
                position_ids=positions.to(device)[0 if self.layout.flat_positions else slice(None)],
                use_cache=False,
                forest=Forest.of(packed, device, number),
                **more,
            )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        head = output_head(self.model)
        return nn.functional.linear(hidden, head.weight, head.bias).float()


def output_head(model: nn.Module) -> Head:
    """Return the head of a model of transformers."""
    layer: Any = cast(Any, model).get_output_embeddings()
    return Head(layer.weight, layer.bias)


def _paths(packed: Sequence[Packed]) -> list[Path]:
    return [path for sequence in packed for path in sequence.paths]


def _places(packed: Sequence[Packed], of: Callable[[Path], Tensor]) -> list[Tensor]:
    """List places of each answer in the row of all sequences."""
    found, start = [], 0
    for sequence in packed:
        found += [start + of(path) for path in sequence.paths]
        start += len(sequence.ids)
    return found


def _sources(packed: Sequence[Packed]) -> Tensor:
    """List the places whose states predict the tokens of all answers, (N,)."""
    return torch.cat(_places(packed, lambda path: path.sources))


def _picked(packed: Sequence[Packed], hidden: Tensor) -> Tensor:
    """Gather the states (N, D) that predict the tokens of all answers."""
    return hidden[_sources(packed).to(hidden.device)]


def _targets(packed: Sequence[Packed]) -> Tensor:
    """Gather the tokens (N,) that are scored."""
    return torch.cat([path.targets for path in _paths(packed)])


def _whole(packed: Sequence[Packed], values: Tensor) -> list[Tensor]:
    """Gather what there is (P + R, D) at the tokens of each prefix and answer."""
    places = _places(packed, lambda path: path.places)
    return [values[where.to(values.device)] for where in places]


def _in_order(
    packed: Sequence[Packed], values: Sequence[T], batch: Sequence[Branches]
) -> list[list[T]]:
    """Sort what was computed per answer by prefix and answer."""
    paths = _paths(packed)
    found = {(p.item, p.answer): value for p, value in zip(paths, values, strict=True)}
    return [[found[i, j] for j in range(len(item.answers))] for i, item in enumerate(batch)]


def _needed(packed: Sequence[Packed]) -> Tensor:
    """Mark the places whose last hidden state is read, (1, T) bool."""
    mask = torch.zeros(1, sum(len(sequence.ids) for sequence in packed), dtype=torch.bool)
    mask[0, _sources(packed)] = True
    return mask


def _recomputes(layer: Any) -> bool:
    """Whether a layer runs again in the backward pass, when no hook would be there any more."""
    return bool(layer.training and getattr(layer, "gradient_checkpointing", False))


@contextmanager
def _working_where(layer: Any, needed: Tensor | None) -> Iterator[None]:
    """Let the token-wise parts of a decoder layer work on some tokens only, (1, T) bool.

    Elsewhere they return zeros. Keys and values are computed for all tokens.
    """
    attention = getattr(layer, "self_attn", None)
    names = ((attention, "q_proj"), (attention, "o_proj"), (layer, "mlp"))
    parts = [getattr(owner, name, None) for owner, name in names]
    if needed is None or any(part is None for part in parts):
        yield
        return
    where = needed[..., None]

    def gather(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][needed], *args[1:])

    def scatter(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        empty = output.new_zeros(*needed.shape, output.shape[-1])
        return empty.masked_scatter(where, output)

    handles = []
    for part in parts:
        assert isinstance(part, nn.Module)
        handles += [part.register_forward_pre_hook(gather), part.register_forward_hook(scatter)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
