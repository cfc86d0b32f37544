"""One loss engine for the DPO family on vision-language models.

A row is one sequence to score: an image variant, a text variant and a response. With the log-ratio
r_k = log pi_policy - log pi_ref of row k, summed over response tokens, a method is a list of terms

    loss = sum over terms of  weight * f( beta * sum_k c_k r_k - offset )

plus regularizers. A `Preset` states them (`mmalign.objectives.vlm_presets`); `plan` says which rows
each network has to be run on, each row once; `vlm_loss` turns the rows' log-probs into losses (B,).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from mmalign.config import PreferenceConfig
from mmalign.config.losses import refuse_preference
from mmalign.objectives.preference import (
    Answers,
    Metrics,
    accuracy,
    preference_loss,
    preference_metrics,
)
from mmalign.objectives.tars import Hidden, spectral_ratio, spectral_triplet
from mmalign.objectives.vlm_rows import (
    ImageVariant,
    Nll,
    Preset,
    Regularizer,
    Response,
    Row,
    RowPlan,
    SpectralRatio,
    SpectralTriplet,
    Term,
    TextVariant,
    TokenKl,
    TokenRule,
    active,
    adapt,
    map_rows,
    plan,
    plan_rows,
    reference_row,
    segment_rule,
    with_image,
)
from mmalign.sequence import (
    TokenLogps,
    align_left,
    desensitised_weights,
    lengths,
    mean_logps,
    sum_logps,
)
from mmalign.types import LogRatios

__all__ = [
    "Extras",
    "ImageVariant",
    "Logps",
    "Nll",
    "Preset",
    "Regularizer",
    "Response",
    "Row",
    "RowPlan",
    "SpectralRatio",
    "SpectralTriplet",
    "Term",
    "TextVariant",
    "TokenKl",
    "TokenRule",
    "adapt",
    "check_used",
    "map_rows",
    "plan",
    "plan_rows",
    "reduce_logps",
    "reference_row",
    "segment_rule",
    "vlm_loss",
    "with_image",
]

T = TypeVar("T")
Logps = Tensor | TokenLogps
"""Log-probs of a row: already reduced by the preset's token rule, (B,), or token by token."""


@dataclass(frozen=True, kw_only=True)
class Extras:
    """What some presets need besides log-probs, as `RowPlan` names it.

    Attributes:
        token_kl: KL(reference || policy) summed over response tokens, (B,) per row.
        log_energy: log spectral energy of the policy's hidden states, (B,) per row of `hidden`.
        ref_log_energy: the same of the reference, per row of `ref_hidden`.
        embeddings: the policy's input embeddings, per row of `embeddings`.
        ref_embeddings: the same of the reference, per row of `ref_embeddings`.
        lengths: response tokens (B,) per row, where log-probs come summed and a part averages them.
        score_margins: score of chosen minus score of rejected (B,), for the `offset` loss.
        widest: of several processes, the largest of their numbers of tokens in the longest answer,
            over which terms at token level take means.
    """

    token_kl: Mapping[Row, Tensor] = field(default_factory=dict)
    log_energy: Mapping[Row, Tensor] = field(default_factory=dict)
    ref_log_energy: Mapping[Row, Tensor] = field(default_factory=dict)
    embeddings: Mapping[Row, Hidden] = field(default_factory=dict)
    ref_embeddings: Mapping[Row, Hidden] = field(default_factory=dict)
    lengths: Mapping[Row, Tensor] = field(default_factory=dict)
    score_margins: Tensor | None = None
    widest: Callable[[int], int] = lambda width: width


def vlm_loss(
    policy_logps: Mapping[Row, Logps],
    ref_logps: Mapping[Row, Logps],
    preset: Preset,
    *,
    beta: float | None = None,
    preference: PreferenceConfig | None = None,
    extras: Extras | None = None,
) -> tuple[Tensor, Metrics]:
    """Compute the loss of each sample.

    Args:
        policy_logps: log-probs of every row in `plan(preset).policy`, summed by the preset's token
            rule (B,), or per token; rules other than the preset's, and terms at token level, need
            them per token.
        ref_logps: the same of every row in `plan(preset).reference`; constants.
        preset: the method.
        beta: strength of the pull to the reference, in units of one over a log-ratio of the
            preset's token rule (0.1 to 0.5 for sums); the preset's own when omitted.
        preference: member of the shared family for terms whose loss is `preference`; sigmoid when
            omitted.
        extras: what else the plan asks for.

    Returns:
        Losses (B,), and metrics as detached scalars: those of `preference_loss` for the first
        term's first chosen and first rejected row, `loss/NAME` of each term and regularizer before
        its weight, and `accuracy/NAME` of each further term, the share of positive sums.

    Raises:
        ValueError: If a row or an extra that the plan names is missing.
        InputError: If the preference config is out of range, or no term of the preset uses it.
    """
    if preference is not None:
        check_used(preset, preference)
    inputs = _Inputs(
        policy_logps,
        ref_logps,
        preset,
        preset.beta if beta is None else beta,
        preference or PreferenceConfig(),
        extras or Extras(),
    )
    losses: dict[str, tuple[float, Tensor]] = {}
    metrics = inputs.first_pair_metrics()
    for index, term in enumerate(active(preset.terms)):
        loss, margin = inputs.term(term)
        losses[term.name] = term.weight, loss
        if index:
            metrics[f"accuracy/{term.name}"] = accuracy(margin)
    for part in active(preset.regularizers):
        losses[part.name] = part.weight, inputs.regularizer(part)
    total = torch.stack([weight * loss for weight, loss in losses.values()]).sum(0)
    metrics |= {f"loss/{name}": loss.detach().mean() for name, (_, loss) in losses.items()}
    return total, metrics


def reduce_logps(
    tokens: TokenLogps, rule: TokenRule, public_lengths: Tensor | None = None
) -> Tensor:
    """Add up the log-probs of a row by a rule, (B,).

    Args:
        tokens: log-probs token by token.
        rule: how.
        public_lengths: shorter length of each pair (B,), for `desensitised`.

    Raises:
        ValueError: If the rule needs something that is missing.
    """
    weights: Tensor | None = None
    if rule.weighting == "segments":
        if tokens.changed is None:
            raise ValueError("segment weights need TokenLogps.changed")
        weights = torch.where(tokens.changed, rule.gamma, 1.0)
    elif rule.weighting == "desensitised":
        if public_lengths is None:
            raise ValueError("length-desensitised sums need the public lengths of the pairs")
        weights = desensitised_weights(tokens.mask, public_lengths, rule.ld_alpha)
    return (mean_logps if rule.average else sum_logps)(tokens, weights)


@dataclass(frozen=True)
class _Inputs:
    """One call's arguments."""

    policy_logps: Mapping[Row, Logps]
    ref_logps: Mapping[Row, Logps]
    preset: Preset
    beta: float
    preference: PreferenceConfig
    extras: Extras

    def first_pair_metrics(self) -> Metrics:
        first = active(self.preset.terms)[0]
        rows = [
            [row for row, c in first.coefficients.items() if sign * c > 0][:1] for sign in (1, -1)
        ]
        with torch.no_grad():
            ratios = [self._logratio(row[0], first) if row else None for row in rows]
            known = next(r for r in ratios if r is not None)
            if known.ndim > 1:
                ratios = [None if r is None else r.sum(1) for r in ratios]
            sides = (torch.zeros(len(known)).to(known) if r is None else r for r in ratios)
            return preference_metrics(LogRatios(*sides), beta=self.beta)

    def term(self, term: Term) -> tuple[Tensor, Tensor]:
        """Compute f and its argument before beta, (B,) each, of one term."""
        chosen, rejected = self._sides(term)
        loss = self._apply(term, LogRatios(chosen, rejected))
        margin = chosen - rejected
        if term.level == "token":
            loss, margin = loss.mean(1), margin.sum(1)
        return loss, margin

    def regularizer(self, part: Regularizer) -> Tensor:
        """Compute one regularizer before its weight, (B,)."""
        match part:
            case Nll():
                return -self._nll_logps(part)
            case TokenKl():
                down, hold = self._kl(part.down), self._kl(part.hold)
                return self.beta * (down - hold.detach())
            case SpectralTriplet():
                ref_states = self.extras.ref_embeddings
                return spectral_triplet(
                    _get(self.extras.embeddings, part.anchor, "embeddings"),
                    _get(ref_states, part.positive, "ref_embeddings"),
                    _get(ref_states, part.negative, "ref_embeddings"),
                    margin=part.margin,
                )
            case SpectralRatio():
                energy, ref_energy = self.extras.log_energy, self.extras.ref_log_energy
                return spectral_ratio(
                    _get(energy, part.chosen, "log_energy"),
                    _get(energy, part.rejected, "log_energy"),
                    _get(ref_energy, part.ref_chosen, "ref_log_energy"),
                    _get(ref_energy, part.ref_rejected, "ref_log_energy"),
                    beta=part.beta,
                )

    def _apply(self, term: Term, sides: LogRatios) -> Tensor:
        if term.offset:
            sides = LogRatios(sides.chosen - term.offset / self.beta, sides.rejected)
        if term.loss == "square":
            return (self.beta * (sides.chosen - sides.rejected)).square()
        config = self.preference
        if term.loss != "preference":
            config = replace(config, loss_type=term.loss, length_normalize=False)
        loss, _ = preference_loss(
            sides,
            beta=self.beta,
            config=config,
            score_margins=self.extras.score_margins,
            answers=self._answers(term),
        )
        return loss

    def _answers(self, term: Term) -> Answers:
        """Give the losses of texts what they need of a term that compares two rows."""
        rows = list(term.coefficients)
        if sorted(term.coefficients.values()) != [-1, 1] or term.level == "token":
            return Answers()
        if term.coefficients[rows[0]] < 0:
            rows.reverse()
        chosen, rejected = (self._logps(self.policy_logps, row, term, "policy") for row in rows)
        counts = [self._length(row, term) for row in rows]
        known = [count for count in counts if count is not None]
        return Answers(
            policy_logps=LogRatios(chosen, rejected),
            lengths=LogRatios(*known) if len(known) == len(rows) else None,
        )

    def _sides(self, term: Term) -> tuple[Tensor, Tensor]:
        """Add up the parts of a term with positive and with negative coefficients."""
        sides: dict[bool, list[Tensor]] = {True: [], False: []}
        for row, coefficient in term.coefficients.items():
            sides[coefficient > 0].append(abs(coefficient) * self._logratio(row, term))
        for row, coefficient in term.kl.items():
            value = self._kl(row)
            constant = value.detach() if coefficient > 0 else value
            sides[coefficient > 0].append(abs(coefficient) * constant)
        like = next(values[0] for values in sides.values() if values)
        chosen, rejected = (
            torch.stack(sides[key]).sum(0) if sides[key] else torch.zeros_like(like)
            for key in (True, False)
        )
        return chosen, rejected

    def _logratio(self, row: Row, term: Term) -> Tensor:
        policy = self._logps(self.policy_logps, row, term, "policy")
        if row in term.frozen:
            policy = policy.detach()
        if self.preset.reference_free:
            return policy
        ref = self._logps(self.ref_logps, reference_row(self.preset, row), term, "reference")
        return policy - ref.detach()

    def _logps(self, table: Mapping[Row, Logps], row: Row, term: Term, what: str) -> Tensor:
        value = _get(table, row, what)
        rule = term.tokens or self.preset.tokens
        if isinstance(value, Tensor):
            if rule != self.preset.tokens or term.level == "token":
                raise ValueError(f"term {term.name} needs the log-probs of {row} token by token")
            return value.to(torch.promote_types(value.dtype, torch.float32))
        if term.level == "token":
            return self._per_token(value, term)
        return reduce_logps(value, rule, self._public_lengths(term, rule))

    def _per_token(self, value: TokenLogps, term: Term) -> Tensor:
        """Line up response tokens on the left, as wide as the longest row of the term, (B, T)."""
        width = self.extras.widest(max(int(n.max()) for n in self._lengths(term)))
        table = align_left(value).logps
        return torch.nn.functional.pad(table, (0, width - table.shape[1]))

    def _public_lengths(self, term: Term, rule: TokenRule) -> Tensor | None:
        if rule.weighting != "desensitised":
            return None
        return torch.stack(self._lengths(term)).amin(0)

    def _lengths(self, term: Term) -> list[Tensor]:
        tables = (_get(self.policy_logps, row, "policy") for row in term.coefficients)
        return [lengths(t.mask) for t in tables if isinstance(t, TokenLogps)]

    def _length(self, row: Row, term: Term) -> Tensor | None:
        """Count a row's tokens, (B,); 1 where its log-probs are averages already."""
        value = _get(self.policy_logps, row, "policy")
        if (term.tokens or self.preset.tokens).average:
            count = len(value) if isinstance(value, Tensor) else len(value.mask)
            return torch.ones(count)
        return (
            lengths(value.mask) if isinstance(value, TokenLogps) else self.extras.lengths.get(row)
        )

    def _nll_logps(self, part: Nll) -> Tensor:
        value = _get(self.policy_logps, part.row, "policy")
        if isinstance(value, TokenLogps):
            return (mean_logps if part.average else sum_logps)(value)
        if self.preset.tokens != TokenRule():
            raise ValueError(f"{part.name} needs the log-probs of {part.row} token by token")
        if not part.average:
            return value
        return value / _get(self.extras.lengths, part.row, "lengths")

    def _kl(self, row: Row) -> Tensor:
        return _get(self.extras.token_kl, row, "token_kl")


def check_used(preset: Preset, preference: PreferenceConfig) -> None:
    """Check that a preset uses the preference loss, or that none is configured.

    Raises:
        InputError: naming the options that would be ignored.
    """
    if not any(term.loss == "preference" for term in active(preset.terms)):
        refuse_preference(f"preset {preset.name}", preference)


def _get(table: Mapping[Row, T], row: Row, what: str) -> T:
    try:
        return table[row]
    except KeyError:
        raise ValueError(f"{what} of {row} is missing") from None
