"""Log-probabilities of the reference: computed once per content and draw, and kept on disk."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mmalign.adapters._vlm import VlmFamily
from mmalign.data.schema import content_hash
from mmalign.data.store import TensorStore
from mmalign.objectives.tars import Hidden, log_energy
from mmalign.pipelines._vlm_rows import Group
from mmalign.reference import Reference
from mmalign.types import Scored

logger = logging.getLogger(__name__)
LAYOUT = "1: log-probs per token; log energy"
SHARD_ENTRIES = 256
BAR_DELAY = 1.0


class RefAnswer(NamedTuple):
    """What the reference says of one answer: log-probs (R,) of its tokens, and a log energy ()."""

    logps: Tensor
    energy: Tensor | None


class ReferenceScores:
    """Runs the reference, or reads what it said before.

    Each prefix is run alone, so a value does not depend on the batch it was first needed in, and a
    resumed run finds or computes the same.
    """

    def __init__(
        self,
        adapter: VlmFamily,
        reference: Reference,
        *,
        folder: Path | None,
        share_prefix: bool,
        energies: bool,
        precision: str,
    ) -> None:
        """Open the cache.

        Args:
            adapter: the model.
            reference: of the policy.
            folder: of the cache; nothing is kept without one.
            share_prefix: as in `VlmAdapter.score`.
            energies: whether log energies of hidden states are needed.
            precision: names in which precision the reference is run; what it said in another one is
                not read.
        """
        self._adapter, self._reference = adapter, reference
        self._share_prefix, self._energies = share_prefix, energies
        self._store: TensorStore | None = None
        if folder is not None:
            name = f"{LAYOUT} {adapter.fingerprint} {energies} {precision}"
            self._store = TensorStore(folder / content_hash(name.encode()).hex())
        self.computed = 0

    @property
    def cached(self) -> bool:
        """Whether values are kept."""
        return self._store is not None

    def fill(self, groups: Iterable[list[Group]], count: int) -> None:
        """Compute what is missing, for `count` samples.

        Raises:
            InputError: the cache cannot be written.
        """
        assert self._store is not None
        shard: dict[str, dict[str, Tensor]] = {}
        for members in tqdm(groups, "reference", total=count, unit="pair", delay=BAR_DELAY):
            for group in members:
                if group.key is None or group.key in self._store or group.key in shard:
                    continue
                shard[group.key] = _entry(self._run(group))
                if len(shard) >= SHARD_ENTRIES:
                    self._store.write("reference", shard)
                    shard = {}
        if shard:
            self._store.write("reference", shard)

    def __call__(self, group: Group) -> list[RefAnswer]:
        """Say what the reference says of each answer of a group."""
        if self._store is None or group.key is None:
            return self._run(group)
        if group.key not in self._store:
            self._store.write("reference", {group.key: _entry(self._run(group))})
        entry = self._store.read(group.key)
        return [
            RefAnswer(entry[f"logps{i}"], entry.get(f"energy{i}")) for i in range(len(group.rows))
        ]

    @torch.no_grad()
    def states(self, groups: Sequence[Group]) -> list[list[Scored]]:
        """Run the reference for its hidden states, which are too large to be kept."""
        with self._reference.active():
            return [
                self._adapter.score([group.branches], share_prefix=self._share_prefix, states=True)[
                    0
                ]
                for group in groups
            ]

    @torch.no_grad()
    def _run(self, group: Group) -> list[RefAnswer]:
        self.computed += 1
        with self._reference.active():
            (scored,) = self._adapter.score(
                [group.branches], share_prefix=self._share_prefix, states=self._energies
            )
        return [RefAnswer(s.logps.cpu(), _energy(s)) for s in scored]


def _energy(scored: Scored) -> Tensor | None:
    if scored.states is None:
        return None
    mask = torch.ones(1, len(scored.states), dtype=torch.bool, device=scored.states.device)
    return log_energy(Hidden(scored.states[None], mask))[0].cpu()


def _entry(answers: Sequence[RefAnswer]) -> dict[str, Tensor]:
    entry = {f"logps{i}": answer.logps for i, answer in enumerate(answers)}
    return entry | {
        f"energy{i}": answer.energy for i, answer in enumerate(answers) if answer.energy is not None
    }
