"""One training step on pairs of answers: rows through both networks, then the preset's loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmalign.adapters._branches import output_head
from mmalign.adapters._vlm import VlmFamily
from mmalign.config import PreferenceConfig, VlmDpoConfig
from mmalign.objectives.tars import Hidden, log_energy
from mmalign.objectives.vlm import Extras, vlm_loss
from mmalign.objectives.vlm_rows import Preset, Row, active, plan, segment_rule
from mmalign.pipelines._vlm_pairs import EncodedPairs
from mmalign.pipelines._vlm_reference import ReferenceScores
from mmalign.pipelines._vlm_rows import Group, RowMaker, Sample
from mmalign.processes import largest
from mmalign.reference import Reference
from mmalign.sequence import TokenLogps, changed_tokens, head_kl
from mmalign.sharding import unwrapped
from mmalign.types import Scored, StepOutput


class VlmBatch(NamedTuple):
    """Pairs of one forward, each in its epoch."""

    pair_ids: tuple[str, ...]
    samples: tuple[Sample, ...]


@dataclass(frozen=True, kw_only=True)
class StepParts:
    """What a step works with.

    Attributes:
        adapter: the model.
        pairs: the pairs.
        maker: makes rows of samples.
        reference: of the policy.
        scores: log-probs of the reference.
        preset: the method.
    """

    adapter: VlmFamily
    pairs: EncodedPairs
    maker: RowMaker
    reference: Reference
    scores: ReferenceScores
    preset: Preset


class VlmStep:
    """Loss and metrics of a batch."""

    def __init__(self, parts: StepParts, config: VlmDpoConfig) -> None:
        """Plan the rows."""
        self._adapter, self._pairs, self._maker = parts.adapter, parts.pairs, parts.maker
        self._reference, self._scores = parts.reference, parts.scores
        self._preset, self._config = parts.preset, config
        names = [field.name for field in fields(PreferenceConfig)]
        self._preference = PreferenceConfig(**{name: getattr(config, name) for name in names})
        self._plan = plan(parts.preset)
        self._moving = tuple(row for row in self._plan.policy if row not in self._plan.frozen)
        self._states = bool(self._plan.token_kl or self._plan.hidden)
        # Reference rows that need no log-probs but an energy are run with the others.
        self._ref_rows = tuple(dict.fromkeys([*self._plan.reference, *self._plan.ref_hidden]))
        # The longest answer says what a mean over tokens divides by; AOT sorts a batch.
        self.coupled = config.loss_type in ("aot", "aot_unpaired") or any(
            term.level == "token" for term in active(parts.preset.terms)
        )

    def reference_groups(self, sample: Sample) -> list[Group]:
        """Make what the reference is run on for a sample."""
        return self._maker.groups(sample, self._ref_rows)

    def __call__(self, batch: VlmBatch) -> StepOutput:
        """Compute the loss, its graph, and metrics."""
        moving = [self._maker.groups(sample, self._moving) for sample in batch.samples]
        frozen = [self._maker.groups(sample, self._plan.frozen) for sample in batch.samples]
        policy = self._run(moving)
        with torch.no_grad():
            for found, more in zip(policy, self._run(frozen), strict=True):
                found |= more
        groups = [[*a, *b] for a, b in zip(moving, frozen, strict=True)]
        same = self._moving == self._ref_rows
        ref_groups = moving if same else [self.reference_groups(s) for s in batch.samples]
        ref, energies = self._reference_answers(ref_groups, policy)
        ref = {row: self._with_changes(batch, row, table) for row, table in ref.items()}
        losses, metrics = vlm_loss(
            {row: self._table(batch, policy, row) for row in self._plan.policy},
            ref,
            self._preset,
            beta=self._config.beta,
            preference=self._preference,
            extras=self._extras(batch, policy, groups, energies),
        )
        tokens = sum(len(a.logps) for found in policy for a in found.values())
        per_pair = tokens / len(batch.samples)
        return StepOutput(losses.mean(), {**metrics, "answer_tokens": per_pair})

    def _run(self, groups: Sequence[Sequence[Group]]) -> list[dict[Row, _Answer]]:
        """Run the policy on groups per sample."""
        flat = [group.branches for members in groups for group in members]
        scored = iter(
            self._adapter.score(
                flat,
                share_prefix=self._config.share_prefix,
                share_images=self._config.group_images,
                states=self._states,
            )
            if flat
            else []
        )
        return [_by_row(members, [next(scored) for _ in members]) for members in groups]

    def _reference_answers(
        self, groups: Sequence[Sequence[Group]], policy: Sequence[Mapping[Row, _Answer]]
    ) -> tuple[dict[Row, TokenLogps], dict[Row, Tensor]]:
        """Collect log-probs (B, L) and log energies (B,) of the reference by row."""
        device = next(iter(policy[0].values())).logps.device
        logps: dict[Row, list[tuple[Tensor, Tensor]]] = {row: [] for row in self._ref_rows}
        energies: dict[Row, list[Tensor]] = {row: [] for row in self._plan.ref_hidden}
        for members in groups:
            for group in members:
                for row, answer, scored in zip(
                    group.rows, self._scores(group), group.scored, strict=True
                ):
                    logps[row].append((answer.logps.to(device), scored))
                    if row in energies and answer.energy is not None:
                        energies[row].append(answer.energy.to(device))
        tables = {row: _stack(parts) for row, parts in logps.items()}
        return tables, {row: torch.stack(parts) for row, parts in energies.items()}

    def _table(
        self, batch: VlmBatch, policy: Sequence[Mapping[Row, _Answer]], row: Row
    ) -> TokenLogps:
        """Stack the policy's log-probs of a row."""
        answers = [found[row] for found in policy]
        table = _stack([(answer.logps, answer.scored) for answer in answers])
        return self._with_changes(batch, row, table)

    def _with_changes(self, batch: VlmBatch, row: Row, table: TokenLogps) -> TokenLogps:
        """Mark the tokens in which chosen and rejected differ, where the preset weighs them."""
        changed = torch.zeros_like(table.mask)
        rule = segment_rule(self._preset)
        if rule is not None and row.response in ("chosen", "rejected"):
            for i, sample in enumerate(batch.samples):
                pair = self._pairs[sample.number]
                sides = changed_tokens(
                    pair.rejected_ids.tolist(),
                    pair.chosen_ids.tolist(),
                    strict=rule.strict,
                )
                changed[i, sides[row.response == "chosen"]] = True
        return table._replace(changed=changed & table.mask)

    def _extras(
        self,
        batch: VlmBatch,
        policy: Sequence[Mapping[Row, _Answer]],
        groups: Sequence[Sequence[Group]],
        ref_energies: Mapping[Row, Tensor],
    ) -> Extras:
        needs = self._plan
        margins = [self._pairs.margins[sample.number] for sample in batch.samples]
        known = [float("nan") if margin is None else margin for margin in margins]
        device = next(iter(policy[0].values())).logps.device
        return Extras(
            token_kl=self._token_kl(groups, policy) if needs.token_kl else {},
            log_energy={row: _energies([p[row] for p in policy]) for row in needs.hidden},
            ref_log_energy=ref_energies,
            embeddings={row: self._embeddings(batch, row) for row in needs.embeddings},
            ref_embeddings=self._ref_embeddings(batch) if needs.ref_embeddings else {},
            score_margins=torch.tensor(known, device=device),
            widest=lambda width: largest(width, device),
        )

    def _token_kl(
        self, groups: Sequence[Sequence[Group]], policy: Sequence[Mapping[Row, _Answer]]
    ) -> dict[Row, Tensor]:
        """Sum KL(reference || policy) over the answer's tokens, (B,) per row."""
        weight = self._head_weight()
        with self._reference.active():
            ref_weight = self._head_weight().detach()
        found: dict[Row, list[Tensor]] = {row: [] for row in self._plan.token_kl}
        for members, answers in zip(groups, policy, strict=True):
            wanted = [group for group in members if set(group.rows) & set(found)]
            for group, scored in zip(wanted, self._scores.states(wanted), strict=True):
                for row, ref in zip(group.rows, scored, strict=True):
                    if row in found:
                        states = (_predicting(answers[row].scored_states), _predicting(ref))
                        kl = head_kl(*states, weight, ref_weight)
                        found[row].append((kl * answers[row].scored.to(kl.device)).sum())
        return {row: torch.stack(values) for row, values in found.items()}

    def _head_weight(self) -> Tensor:
        scorer: Any = unwrapped(self._adapter.policy)
        return output_head(scorer.model).weight

    def _embeddings(self, batch: VlmBatch, row: Row) -> Hidden:
        scorer: Any = unwrapped(self._adapter.policy)
        groups = [self._maker.groups(sample, [row])[0] for sample in batch.samples]
        rows = [answers[0] for answers in scorer.embed([group.branches for group in groups])]
        mask = [torch.ones(len(states), dtype=torch.bool, device=states.device) for states in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        return Hidden(pad(rows, batch_first=True), pad(mask, batch_first=True))

    @torch.no_grad()
    def _ref_embeddings(self, batch: VlmBatch) -> dict[Row, Hidden]:
        with self._reference.active():
            return {row: self._embeddings(batch, row) for row in self._plan.ref_embeddings}


class _Answer(NamedTuple):
    """One answer as the policy scored it: log-probs (R,), tokens that count (R,), states."""

    logps: Tensor
    scored: Tensor
    scored_states: Scored


def _by_row(groups: Sequence[Group], scored: Sequence[Sequence[Scored]]) -> dict[Row, _Answer]:
    return {
        row: _Answer(answer.logps, counts, answer)
        for group, answers in zip(groups, scored, strict=True)
        for row, answer, counts in zip(group.rows, answers, group.scored, strict=True)
    }


def _stack(parts: Sequence[tuple[Tensor, Tensor]]) -> TokenLogps:
    """Put answers of different lengths into one table, padded at the end."""
    pad = torch.nn.utils.rnn.pad_sequence
    logps = pad([logps for logps, _ in parts], batch_first=True)
    mask = pad([scored for _, scored in parts], batch_first=True).to(logps.device)
    return TokenLogps(logps * mask, mask)


def _predicting(scored: Scored) -> Tensor:
    """Select the states (R, D) that predict the tokens of an answer."""
    assert scored.states is not None
    return scored.states[-len(scored.logps) - 1 : -1]


def _energies(answers: Sequence[_Answer]) -> Tensor:
    rows = []
    for answer in answers:
        states = answer.scored_states.states
        assert states is not None
        mask = torch.ones(1, len(states), dtype=torch.bool, device=states.device)
        rows.append(log_energy(Hidden(states[None], mask))[0])
    return torch.stack(rows)
