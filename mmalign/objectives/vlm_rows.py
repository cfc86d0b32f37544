"""What a method of the DPO family is made of, as data: rows, terms, regularizers, presets, plans.

The equation is in `mmalign.objectives.vlm`, the methods are in `mmalign.objectives.vlm_presets`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, TypeVar

from mmalign.config import LossType
from mmalign.types import InputError

ImageVariant = Literal["clean", "noised", "masked", "cropped", "absent", "other"]
TextVariant = Literal["clean", "perturbed"]
Response = Literal["chosen", "rejected", "self", "revised", "other"]


class Row(NamedTuple):
    """One sequence to score.

    Attributes:
        image: `noised` at a diffusion timestep, `masked` patches, `cropped`, `absent` (a blank
            image) or `other` (the image of another sample).
        text: whether prompt and answer are perturbed.
        response: `self` is the policy's arg-max answer under the noised image, scored in the
            context of the chosen one (`sequence.argmax_labels`); `revised` a corrected version of
            the rejected answer; `other` the chosen answer of the sample the `other` image is from.
    """

    image: ImageVariant = "clean"
    text: TextVariant = "clean"
    response: Response = "chosen"


@dataclass(frozen=True, kw_only=True)
class TokenRule:
    """How the log-probs of a row's tokens become one number.

    Attributes:
        weighting: `uniform`; `segments`, where tokens in which the answers differ weigh `gamma`; or
            `desensitised`, where tokens beyond the shorter answer's length weigh `ld_alpha`.
        average: divide the weighted sum by the sum of weights.
        gamma: weight of changed tokens, for `segments`.
        strict: which tokens count as changed, for `segments`: see `sequence.changed_tokens`.
        ld_alpha: weight of excess tokens, for `desensitised`, in [0, 1].
    """

    weighting: Literal["uniform", "segments", "desensitised"] = "uniform"
    average: bool = False
    gamma: float = 5.0
    strict: bool = False
    ld_alpha: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Term:
    """`weight * f(beta * sum_k c_k r_k - offset)`.

    Attributes:
        name: names the term in metrics and in `adapt`.
        coefficients: c_k of each row.
        weight: multiplier of the loss.
        loss: f: a member of the shared family, or the `square`, or `preference`, the member that
            the run is configured with. Terms that compare images or anchor a reward name theirs,
            because flipped labels and score margins have no meaning there. A member that looks at
            both sides gets the sum of parts with positive and that of parts with negative c_k.
        offset: in nats, after beta.
        tokens: rule of this term; the preset's when omitted.
        level: `response`, or `token`: f of every single token position, averaged over positions.
        kl: coefficients, inside beta, of the token KL of rows. Positive ones are constants.
        frozen: rows whose policy log-probs are constants.
    """

    name: str
    coefficients: Mapping[Row, float]
    weight: float = 1.0
    loss: LossType | Literal["preference", "square"] = "sigmoid"
    offset: float = 0.0
    tokens: TokenRule | None = None
    level: Literal["response", "token"] = "response"
    kl: Mapping[Row, float] = field(default_factory=dict)
    frozen: frozenset[Row] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Nll:
    """`weight * -log pi_policy(row)`: supervised fine-tuning on a row, per token or summed."""

    name: str
    row: Row
    weight: float
    average: bool = True


@dataclass(frozen=True, kw_only=True)
class TokenKl:
    """`weight * beta * (KL(down) - stop_gradient KL(hold))`, the token term of TDPO and CHiP."""

    name: str
    down: Row
    hold: Row
    weight: float


@dataclass(frozen=True, kw_only=True)
class SpectralTriplet:
    """`weight *` the triplet loss on amplitude spectra of input embeddings (TARS' code).

    The policy's embeddings of `anchor` shall be nearer to the reference's embeddings of `positive`
    than to those of `negative`, by `margin`.
    """

    name: str
    anchor: Row
    positive: Row
    negative: Row
    weight: float
    margin: float = 0.5


@dataclass(frozen=True, kw_only=True)
class SpectralRatio:
    """`weight *` the logistic loss on log-ratios of spectral energies (TARS' paper, equation 11).

    Energies are the policy's at `chosen` and `rejected`, the reference's at `ref_chosen` and
    `ref_rejected`.
    """

    name: str
    chosen: Row
    rejected: Row
    ref_chosen: Row
    ref_rejected: Row
    weight: float
    beta: float = 1.0


Regularizer = Nll | TokenKl | SpectralTriplet | SpectralRatio
Part = TypeVar("Part", Term, Regularizer)


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """How image variants are made.

    Attributes:
        noise_timestep: step of the 1000-step noise schedule, for `noised`.
        mask_share: share of the image that is masked, for `masked`.
        mask_patch: side of a masked patch in pixels, for `masked`.
        crop_min_share: smallest share of the area that is kept, for `cropped`.
        crop_max_share: largest share of the area that is kept, for `cropped`.
    """

    noise_timestep: int = 500
    mask_share: float = 0.3
    mask_patch: int = 14
    crop_min_share: float = 0.01
    crop_max_share: float = 0.2


@dataclass(frozen=True, kw_only=True)
class PerturbSettings:
    """How text variants are made.

    Attributes:
        scope: perturb the `prompt` alone, or `all` of the text.
        rule: `visual_gap`: the least similar tokens, as many as omega and the gap between the two
            least similar say; `share`: a share of the tokens, drawn with probabilities that fall
            with similarity.
        mode: put the mask token, or random tokens of the vocabulary, in their place.
        omega: numerator of the number of tokens, for `visual_gap`.
        max_share: largest share of tokens, for `visual_gap`.
        share: share of tokens, for `share`.
    """

    scope: Literal["prompt", "all"] = "prompt"
    rule: Literal["visual_gap", "share"] = "visual_gap"
    mode: Literal["mask", "replace"] = "mask"
    omega: float = 0.1
    max_share: float = 0.5
    share: float = 0.05


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A method.

    Attributes:
        name: its name.
        terms: at least one; the first reports `rewards/chosen` and so on.
        beta: of the authors, in units of one over a log-ratio of the preset's token rule.
        regularizers: added to the terms.
        tokens: how token log-probs are added up.
        ref_text: text variant the reference is conditioned on for perturbed rows: `same`, so that
            both networks see one prompt, or `clean`.
        reference_free: the log-probs themselves stand in for log-ratios; no reference is run.
        images: how image variants are made.
        perturb: how text variants are made.
        source: paper and code.
        deviations: where this differs from either.
    """

    name: str
    terms: tuple[Term, ...]
    beta: float
    regularizers: tuple[Regularizer, ...] = ()
    tokens: TokenRule = TokenRule()
    ref_text: Literal["same", "clean"] = "same"
    reference_free: bool = False
    images: ImageSettings = ImageSettings()
    perturb: PerturbSettings = PerturbSettings()
    source: str
    deviations: str = ""

    def __post_init__(self) -> None:
        """Refuse what no loss could be computed from."""
        names = [part.name for part in (*self.terms, *self.regularizers)]
        if not active(self.terms) or len(set(names)) < len(names):
            raise ValueError(f"preset {self.name} needs terms, and parts of different names")


class RowPlan(NamedTuple):
    """Which rows a preset needs, each once, in order of first use.

    Attributes:
        policy: rows whose log-probs (or hidden states) the policy computes.
        frozen: those of them that need no gradient.
        reference: rows whose log-probs the reference computes.
        token_kl: rows whose token KL is needed, from both networks.
        hidden: rows whose last hidden states are needed from the policy.
        ref_hidden: the same from the reference.
        embeddings: rows whose input embeddings are needed from the policy: no forward.
        ref_embeddings: the same from the reference.
    """

    policy: tuple[Row, ...]
    frozen: tuple[Row, ...]
    reference: tuple[Row, ...]
    token_kl: tuple[Row, ...]
    hidden: tuple[Row, ...]
    ref_hidden: tuple[Row, ...]
    embeddings: tuple[Row, ...]
    ref_embeddings: tuple[Row, ...]


def plan(preset: Preset) -> RowPlan:
    """Say which rows a preset needs: each once, in order of first use."""
    needs: dict[str, list[Row]] = {name: [] for name in (*RowPlan._fields, "moving")}
    for term in active(preset.terms):
        for row in term.coefficients:
            needs["policy"].append(row)
            needs["reference"].append(reference_row(preset, row))
            if row not in term.frozen:
                needs["moving"].append(row)
        for row, coefficient in term.kl.items():
            _plan_kl(needs, row, constant=coefficient > 0)
    for part in active(preset.regularizers):
        _plan_regularizer(needs, part)
    needs["frozen"] = [row for row in needs["policy"] if row not in needs["moving"]]
    if preset.reference_free:
        needs["reference"] = []
    return RowPlan(*(tuple(dict.fromkeys(needs[name])) for name in RowPlan._fields))


def active(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """Leave out parts of weight 0, which cost nothing."""
    return tuple(part for part in parts if part.weight)


def plan_rows(preset: Preset) -> tuple[Row, ...]:
    """List the rows the policy is run on, each once, in order of first use."""
    return plan(preset).policy


def segment_rule(preset: Preset) -> TokenRule | None:
    """Return the rule for which `TokenLogps.changed` is needed, if there is one."""
    rules = (preset.tokens, *(term.tokens for term in active(preset.terms)))
    return next((r for r in rules if r is not None and r.weighting == "segments"), None)


def reference_row(preset: Preset, row: Row) -> Row:
    """Say which row of the reference stands against a row of the policy."""
    return row._replace(text="clean") if preset.ref_text == "clean" else row


def adapt(
    preset: Preset, *, weights: Mapping[str, float] | None = None, perturbed: bool = True
) -> Preset:
    """Switch parts of a preset off or weigh them anew, for ablations.

    Args:
        preset: what to start from.
        weights: new weights by name of term or regularizer; 0 takes a part out, with its rows.
        perturbed: false replaces every perturbed text by the clean one.

    Raises:
        InputError: If a name is unknown, a weight is negative, or no term remains.
    """
    weights = weights or {}
    names = [part.name for part in (*preset.terms, *preset.regularizers)]
    for name, weight in weights.items():
        if name not in names:
            raise InputError(
                f"preset {preset.name} has no part {name!r}; it has {', '.join(names)}"
            )
        if weight < 0:
            raise InputError(f"the weight of {name} must not be negative, got {weight}")
    terms = tuple(replace(t, weight=weights.get(t.name, t.weight)) for t in preset.terms)
    parts = tuple(replace(p, weight=weights.get(p.name, p.weight)) for p in preset.regularizers)
    if not active(terms):
        raise InputError(f"preset {preset.name} needs at least one term with a weight above 0")
    changed = replace(preset, terms=active(terms), regularizers=active(parts))
    return changed if perturbed else map_rows(changed, lambda row: row._replace(text="clean"))


def with_image(preset: Preset, old: ImageVariant, new: ImageVariant) -> Preset:
    """Exchange one image variant for another, such as mDPO's crops for masked patches."""
    return map_rows(preset, lambda row: row._replace(image=new) if row.image == old else row)


def map_rows(preset: Preset, change: Callable[[Row], Row]) -> Preset:
    """Apply `change` to every row of a preset; coefficients of rows that become equal are added."""

    def collect(coefficients: Mapping[Row, float]) -> dict[Row, float]:
        merged: dict[Row, float] = {}
        for row, coefficient in coefficients.items():
            merged[change(row)] = merged.get(change(row), 0.0) + coefficient
        return merged

    terms = tuple(
        replace(
            term,
            coefficients=collect(term.coefficients),
            kl=collect(term.kl),
            frozen=frozenset(map(change, term.frozen)),
        )
        for term in preset.terms
    )
    parts = tuple(_map_rows_of(part, change) for part in preset.regularizers)
    return replace(preset, terms=terms, regularizers=parts)


def _map_rows_of(part: Regularizer, change: Callable[[Row], Row]) -> Regularizer:
    values = {spec.name: getattr(part, spec.name) for spec in fields(part)}
    rows: dict[str, Any] = {k: change(v) for k, v in values.items() if isinstance(v, Row)}
    return replace(part, **rows)


def _plan_kl(needs: dict[str, list[Row]], row: Row, *, constant: bool) -> None:
    needs["policy"].append(row)
    needs["token_kl"].append(row)
    if not constant:
        needs["moving"].append(row)


def _plan_regularizer(needs: dict[str, list[Row]], part: Regularizer) -> None:
    match part:
        case Nll():
            needs["policy"].append(part.row)
            needs["moving"].append(part.row)
        case TokenKl():
            _plan_kl(needs, part.down, constant=False)
            _plan_kl(needs, part.hold, constant=True)
        case SpectralTriplet():
            needs["embeddings"].append(part.anchor)
            needs["ref_embeddings"] += [part.positive, part.negative]
        case SpectralRatio():
            rows = [part.chosen, part.rejected]
            needs["policy"] += rows
            needs["moving"] += rows
            needs["hidden"] += rows
            needs["ref_hidden"] += [part.ref_chosen, part.ref_rejected]
