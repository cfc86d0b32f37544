"""How prefixes and answers are laid out in the sequences of a forward.

A sequence is a tree, written out in one row: the image with what stands before it, then the
questions about it, then the answers to each. Each run of tokens sees itself and what it grew from,
and starts at the position after that, so that every token sees exactly what it would see in a
sequence of its own: results are the same up to rounding. Two answers to one question need
P + R1 + R2 tokens instead of 2 P + R1 + R2, and equal ones stand there once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmalign.types import Branches, ImageFeatures

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


class Sharing(NamedTuple):
    """What is computed once: prefixes for their answers, images for the questions about them."""

    prefixes: bool = True
    images: bool = False


class Path(NamedTuple):
    """An answer in a sequence.

    Attributes:
        item: number of its prefix in the batch.
        answer: number among the answers of the prefix.
        places: of the tokens of prefix and answer, (P + R,).
        targets: tokens that are scored, (R,).
    """

    item: int
    answer: int
    places: Tensor
    targets: Tensor

    @property
    def size(self) -> int:
        """R."""
        return len(self.targets)

    @property
    def sources(self) -> Tensor:
        """Places whose hidden state predicts the answer's tokens, (R,)."""
        return self.places[-self.size - 1 : -1]


@dataclass(frozen=True)
class Packed:
    """One tree, written out.

    Attributes:
        ids: tokens (T,).
        positions: of the tokens (K, T).
        node: which run each token belongs to (T,).
        sees: whether a run sees another one, (n, n) bool.
        paths: the answers.
        features: of the images.
    """

    ids: Tensor
    positions: Tensor
    node: Tensor
    sees: Tensor
    paths: tuple[Path, ...]
    features: ImageFeatures | None

    @property
    def stem(self) -> int:
        """Count the tokens at the beginning that see all before them."""
        whole = self.sees | torch.ones_like(self.sees).triu(1)
        runs = int(whole.all(1).long().cumprod(0).sum())
        return int((self.node < runs).sum())

    def visible(self, start: int) -> Tensor:
        """Say what the tokens from `start` on see, (T - start, T) bool."""
        place = torch.arange(len(self.ids))
        return self.sees[self.node[start:]][:, self.node] & (place <= place[start:, None])


def pack(batch: Sequence[Branches], layout: Layout, sharing: Sharing) -> list[Packed]:
    """Lay out the prefixes of a batch with their answers.

    Prefixes with one and the same `ImageFeatures` are about the same images.
    """
    packed: list[Packed] = []
    for members in _groups(batch, layout, sharing):
        if sharing.prefixes:
            answers = [[(i, j) for j in range(len(batch[i].answers))] for i in members]
            packed.append(_tree(batch, list(zip(members, answers, strict=True)), layout))
        else:
            pairs = [(i, j) for i in members for j in range(len(batch[i].answers))]
            packed += [_tree(batch, [(i, [(i, j)])], layout) for i, j in pairs]
    return packed


class _Tree:
    """Runs of tokens, each grown from an earlier one."""

    def __init__(self) -> None:
        self.ids: list[Tensor] = []
        self.positions: list[Tensor] = []
        self.parents: list[int] = []
        self._starts = [0]

    def grow(self, parent: int, ids: Tensor, positions: Tensor) -> int:
        """Add a run; an empty one is its parent."""
        if not len(ids):
            return parent
        self.ids.append(ids)
        self.positions.append(positions)
        self.parents.append(parent)
        self._starts.append(self._starts[-1] + len(ids))
        return len(self.ids) - 1

    def places(self, node: int) -> Tensor:
        """List the places of a run and of those it grew from, in order."""
        line = [*reversed(list(self._line(node)))]
        return torch.cat([torch.arange(*self._starts[n : n + 2]) for n in line])

    def sees(self) -> Tensor:
        table = torch.zeros(len(self.ids), len(self.ids), dtype=torch.bool)
        for node in range(len(self.ids)):
            table[node, list(self._line(node))] = True
        return table

    def _line(self, node: int) -> Iterator[int]:
        while node >= 0:
            yield node
            node = self.parents[node]


def _tree(
    batch: Sequence[Branches], members: Sequence[tuple[int, list[tuple[int, int]]]], layout: Layout
) -> Packed:
    """Write out prefixes about the same images, each with some of its answers."""
    tree, paths = _Tree(), []
    prefixes = [batch[i].prefix_ids.cpu() for i, _ in members]
    features = batch[members[0][0]].features
    tensors = {} if features is None else features.tensors
    common = _common(prefixes)
    root = -1
    for prefix, (item, answers) in zip(prefixes, members, strict=True):
        positions = layout.positions(prefix, tensors).cpu()
        if root < 0:
            root = tree.grow(-1, prefix[:common], positions[:, :common])
        question = tree.grow(root, prefix[common:], positions[:, common:])
        after = int(positions.max()) + 1
        nodes: dict[tuple[int, ...], int] = {}
        for _, number in answers:
            ids, targets = _answer(batch[item], number)
            content = tuple(ids.tolist())
            if content not in nodes:
                own = (after + torch.arange(len(ids))).expand(len(positions), -1)
                nodes[content] = tree.grow(question, ids, own)
            paths.append(Path(item, number, tree.places(nodes[content]), targets))
    runs = [torch.full((len(ids),), node) for node, ids in enumerate(tree.ids)]
    return Packed(
        ids=torch.cat(tree.ids),
        positions=torch.cat(tree.positions, dim=1),
        node=torch.cat(runs),
        sees=tree.sees(),
        paths=tuple(paths),
        features=features,
    )


def _answer(branches: Branches, number: int) -> tuple[Tensor, Tensor]:
    """Return an answer and the tokens that are scored at its places, (R,) each."""
    ids = branches.answers[number].cpu()
    labels = branches.labels[number] if branches.labels else None
    return ids, ids if labels is None else labels.cpu()


def _groups(batch: Sequence[Branches], layout: Layout, sharing: Sharing) -> list[list[int]]:
    """Put the numbers of prefixes about the same images together."""
    together: dict[object, list[int]] = {}
    for number, item in enumerate(batch):
        shared = sharing.prefixes and sharing.images and item.features is not None
        together.setdefault(id(item.features) if shared else (number,), []).append(number)
    groups: list[list[int]] = []
    for members in together.values():
        prefixes = [batch[i].prefix_ids.cpu() for i in members]
        rest = torch.cat([prefix[_common(prefixes) :] for prefix in prefixes])
        inside = not bool((rest == layout.image_token_id).any())
        groups += [members] if inside else [[i] for i in members]
    return groups


def _common(prefixes: Sequence[Tensor]) -> int:
    """Count the tokens with which all prefixes begin."""
    common = min(map(len, prefixes))
    for other in prefixes[1:]:
        same = (prefixes[0][:common] == other[:common]).long()
        common = int(same.cumprod(0).sum())
    return common
