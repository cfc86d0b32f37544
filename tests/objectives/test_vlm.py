"""The loss engine: rows, terms, regularizers, and what a plan asks for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mmalign.config import PreferenceConfig
from mmalign.objectives.vlm import (
    Extras,
    Nll,
    Preset,
    Row,
    Term,
    TokenRule,
    adapt,
    map_rows,
    plan,
    plan_rows,
    reduce_logps,
    segment_rule,
    vlm_loss,
    with_image,
)
from mmalign.objectives.vlm_presets import NOISED_W, PERTURBED_L, PERTURBED_W, PRESETS, L, W
from mmalign.sequence import TokenLogps
from mmalign.types import InputError

DPO = PRESETS["dpo"]


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


POLICY = {W: column(-40, -20), L: column(-55, -30)}
REFERENCE = {W: column(-42, -19), L: column(-53, -33)}


def with_terms(*terms: Term, **changes: object) -> Preset:
    return dataclasses.replace(DPO, terms=terms, **changes)


def test_terms_and_coefficients_add_up() -> None:
    preset = with_terms(
        Term(name="first", coefficients={W: 1, L: -1}),
        Term(name="second", coefficients={W: 0.5, L: 2}, weight=3, offset=0.25),
        Term(name="third", coefficients={L: 1}, weight=0.1, loss="square", offset=1),
    )
    loss, metrics = vlm_loss(POLICY, REFERENCE, preset)
    for i, (won, lost) in enumerate([(2.0, -2.0), (-1.0, 3.0)]):
        first = math.log(1 + math.exp(-0.1 * (won - lost)))
        second = math.log(1 + math.exp(-(0.1 * (won / 2 + 2 * lost) - 0.25)))
        third = (0.1 * lost - 1) ** 2
        assert loss[i].item() == pytest.approx(first + 3 * second + third / 10)
    assert metrics["margin"].item() == pytest.approx((4 - 4) / 2)
    assert metrics["rewards/chosen"].item() == pytest.approx(0.1 * (2 - 1) / 2)
    assert metrics["accuracy/second"].item() == 0.5
    assert {"loss/first", "loss/second", "loss/third"} <= metrics.keys()
    assert "accuracy/first" not in metrics


def test_beta_of_the_call_comes_first() -> None:
    loss, metrics = vlm_loss(POLICY, REFERENCE, DPO, beta=0.5)
    assert loss[0].item() == pytest.approx(math.log(1 + math.exp(-0.5 * 4)))
    assert metrics["rewards/chosen"].item() == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (PreferenceConfig(loss_type="ipo"), (4 - 5) ** 2),
        (PreferenceConfig(loss_type="hinge"), 0.6),
        (PreferenceConfig(loss_type="ipo", length_normalize=True), (2 / 4 + 2 / 8 - 5) ** 2),
        (PreferenceConfig(loss_type="sft"), 40 / 4),
        (PreferenceConfig(loss_type="offset", offset_scale=0.3), math.log(1 + math.exp(0.2))),
        (
            PreferenceConfig(loss_type="simpo", target_margin=0.5),
            math.log(1 + math.exp(-0.1 * (55 / 8 - 40 / 4) + 0.5)),
        ),
    ],
)
def test_every_loss_of_the_family_works(config: PreferenceConfig, want: float) -> None:
    extras = Extras(
        lengths={W: torch.tensor([4, 2]), L: torch.tensor([8, 3])},
        score_margins=torch.tensor([2.0, 2.0]),
    )
    loss, _ = vlm_loss(POLICY, REFERENCE, DPO, preference=config, extras=extras)
    assert loss[0].item() == pytest.approx(want)


def test_lengths_come_from_tokens_too() -> None:
    config = PreferenceConfig(loss_type="sigmoid_norm")
    policy, ref = token_tables([W, L])
    loss, _ = vlm_loss(policy, ref, DPO, preference=config)
    sides = [(policy[r].logps - ref[r].logps).sum(1) / policy[r].mask.sum(1) for r in (W, L)]
    assert_close(loss, -torch.sigmoid(0.1 * (sides[0] - sides[1])).log())


def test_a_term_with_a_loss_of_its_own_ignores_the_configured_one() -> None:
    preset = with_terms(
        Term(name="anchor", coefficients={W: 1}),
        Term(name="dpo", coefficients={W: 1, L: -1}, loss="preference"),
    )
    config = PreferenceConfig(loss_type="ipo")
    loss, metrics = vlm_loss(POLICY, REFERENCE, preset, preference=config)
    assert loss[0].item() == pytest.approx(math.log(1 + math.exp(-0.2)) + (4 - 5) ** 2)
    assert metrics["rewards/rejected"].item() == 0


def test_a_configured_loss_is_never_ignored_in_silence() -> None:
    config = PreferenceConfig(loss_type="ipo")
    for name in ("simpo", "opa_token_level"):
        with pytest.raises(InputError, match=f"preset {name} fixes its losses: leave out .* ipo"):
            vlm_loss(POLICY, REFERENCE, PRESETS[name], preference=config)
    with pytest.raises(InputError, match="aot needs the log-probs of two answers"):
        vlm_loss(
            dict.fromkeys(plan_rows(PRESETS["v_dpo"]), POLICY[W]),
            dict.fromkeys(plan_rows(PRESETS["v_dpo"]), POLICY[W]),
            PRESETS["v_dpo"],
            preference=PreferenceConfig(loss_type="aot"),
        )


def test_the_reference_is_a_constant() -> None:
    sides = [{k: v.clone().requires_grad_() for k, v in t.items()} for t in (POLICY, REFERENCE)]
    vlm_loss(*sides, DPO)[0].sum().backward()
    assert sides[0][W].grad.lt(0).all()
    assert sides[0][L].grad.gt(0).all()
    assert sides[1][W].grad is None


def test_swapping_answers_flips_the_margin() -> None:
    _, metrics = vlm_loss(POLICY, REFERENCE, DPO)
    swapped = [{W: table[L], L: table[W]} for table in (POLICY, REFERENCE)]
    _, other = vlm_loss(*swapped, DPO)
    assert metrics["margin"] == -other["margin"]
    assert metrics["rewards/accuracy"] == 1 - other["rewards/accuracy"]


@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_row_is_named(missing: int) -> None:
    tables = [dict(POLICY), dict(REFERENCE)]
    del tables[missing][L]
    with pytest.raises(ValueError, match=r"(policy|reference) of Row\(.*rejected"):
        vlm_loss(*tables, DPO)


def test_a_missing_extra_is_named() -> None:
    with pytest.raises(ValueError, match="token_kl of Row"):
        vlm_loss(*([{W: column(0), L: column(0), NOISED_W: column(0)}] * 2), PRESETS["chip_fused"])


def token_tables(rows: list[Row]) -> tuple[dict[Row, TokenLogps], dict[Row, TokenLogps]]:
    """Log-probs token by token, with answers of different lengths at different places."""
    mask = {
        "chosen": torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 1, 0]]).bool(),
        "rejected": torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool(),
    }
    tables: tuple[dict[Row, TokenLogps], ...] = ({}, {})
    for number, row in enumerate(rows):
        where = mask["rejected" if row.response == "rejected" else "chosen"]
        for network, table in enumerate(tables):
            count = torch.arange(10, dtype=torch.float64)
            logps = -1 - torch.sin(count + number + 10 * network).reshape(2, 5)
            changed = where & (count.reshape(2, 5) % 3 == 0)
            table[row] = TokenLogps(logps * where, where, changed)
    return tables


def test_token_rules() -> None:
    tokens = token_tables([W])[0][W]
    rule = TokenRule(weighting="segments", gamma=5, average=False)
    weights = 1 + 4 * tokens.changed
    assert_close(reduce_logps(tokens, rule), (weights * tokens.logps).sum(1))
    average = reduce_logps(tokens, dataclasses.replace(rule, average=True))
    assert_close(average, (weights * tokens.logps).sum(1) / (weights * tokens.mask).sum(1))
    with pytest.raises(ValueError, match="changed"):
        reduce_logps(TokenLogps(tokens.logps, tokens.mask), rule)
    with pytest.raises(ValueError, match="public lengths"):
        reduce_logps(tokens, TokenRule(weighting="desensitised"))


def test_which_presets_need_changed_tokens() -> None:
    needed = {name: segment_rule(preset) for name, preset in PRESETS.items()}
    strict = {name: rule.strict for name, rule in needed.items() if rule is not None}
    assert strict == {
        "rlhf_v": False,
        "rlhf_v_official": True,
        "chip": False,
        "chip_fused": True,
    }
    assert segment_rule(adapt(PRESETS["chip"], weights={"segment": 0})) is None


def test_length_desensitised_dpo_discounts_what_the_longer_answer_has_more() -> None:
    policy, ref = token_tables([W, L])
    loss, _ = vlm_loss(policy, ref, PRESETS["ld_dpo"])
    ratios = {row: policy[row].logps - ref[row].logps for row in (W, L)}
    # Lengths are 3 and 4 in the first pair, 2 and 3 in the second: one token in excess each.
    rejected = ratios[L].sum(1) - 0.5 * torch.stack([ratios[L][0, 4], ratios[L][1, 2]])
    assert_close(loss, -torch.sigmoid(0.1 * (ratios[W].sum(1) - rejected)).log())


def test_a_rule_of_its_own_needs_tokens() -> None:
    sums = {row: column(0) for row in plan_rows(PRESETS["chip"])}
    kl = Extras(token_kl={W: column(0), L: column(0)})
    with pytest.raises(ValueError, match="segment needs the log-probs"):
        vlm_loss(sums, sums, PRESETS["chip"], extras=kl)


def test_supervised_regularizer_is_per_token_or_summed() -> None:
    policy, ref = token_tables([W, L])
    sums = [{row: table[row].logps.sum(1) for row in table} for table in (policy, ref)]
    plain, _ = vlm_loss(policy, ref, DPO)
    for average in (True, False):
        part = Nll(name="sft", row=W, weight=0.7, average=average)
        preset = dataclasses.replace(DPO, regularizers=(part,))
        count = policy[W].mask.sum(1) if average else 1
        want = plain - 0.7 * policy[W].logps.sum(1) / count
        assert_close(vlm_loss(policy, ref, preset)[0], want)
        extras = Extras(lengths={W: policy[W].mask.sum(1)})
        assert_close(vlm_loss(*sums, preset, extras=extras)[0], want)
    average = dataclasses.replace(preset, tokens=TokenRule(average=True))
    with pytest.raises(ValueError, match="token by token"):
        vlm_loss(*sums, average)


def test_token_level_terms_compare_position_by_position() -> None:
    policy, ref = token_tables([W, L])
    preset = with_terms(Term(name="dpo", coefficients={W: 1, L: -1}, level="token"))
    loss, metrics = vlm_loss(policy, ref, preset)
    want = []
    for i in range(2):
        ratios = []
        for row in (W, L):
            values = (policy[row].logps - ref[row].logps)[i][policy[row].mask[i]].tolist()
            ratios.append(values + [0.0] * (4 - len(values)))
        terms = [math.log(1 + math.exp(-0.1 * (c - r))) for c, r in zip(*ratios, strict=True)]
        want.append(sum(terms) / 4)
    assert loss.tolist() == pytest.approx(want)
    whole, plain = vlm_loss(policy, ref, DPO)
    assert_close(metrics["margin"], plain["margin"])
    assert not torch.allclose(loss, whole)
    with pytest.raises(ValueError, match="token by token"):
        vlm_loss(POLICY, REFERENCE, preset)


def test_reference_free_presets_run_no_reference() -> None:
    preset = PRESETS["simpo"]
    assert plan(preset).reference == ()
    loss, _ = vlm_loss({W: column(-1), L: column(-1.5)}, {}, preset)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-(2 * 0.5 - 0.5))))


def test_equal_rows_are_planned_once_in_order_of_first_use() -> None:
    assert plan_rows(PRESETS["mdpo"]) == (W, L, Row(image="cropped"))
    twice = with_terms(
        Term(name="a", coefficients={L: -1, W: 1}), Term(name="b", coefficients={W: 1, L: -2})
    )
    assert plan_rows(twice) == (L, W)


def test_parts_without_weight_are_neither_planned_nor_computed() -> None:
    off = adapt(PRESETS["tars_official"], weights={"visual": 0, "spectral": 0})
    assert plan_rows(off) == (PERTURBED_W, PERTURBED_L)
    assert plan(off).embeddings == plan(off).ref_embeddings == ()
    zero = with_terms(
        Term(name="dpo", coefficients={W: 1, L: -1}),
        Term(name="visual", coefficients={W: 1, NOISED_W: -1}, weight=0),
    )
    assert plan_rows(zero) == (W, L)
    assert_close(vlm_loss(POLICY, REFERENCE, zero)[0], vlm_loss(POLICY, REFERENCE, DPO)[0])


def test_ablations_by_name() -> None:
    tars = PRESETS["tars"]
    plain = adapt(tars, weights={"spectral": 0}, perturbed=False)
    assert plan(plain) == plan(DPO)
    loss, _ = vlm_loss(POLICY, REFERENCE, plain, beta=0.1)
    assert_close(loss, vlm_loss(POLICY, REFERENCE, DPO)[0])
    assert adapt(tars, weights={"spectral": 0.2}).regularizers[0].weight == 0.2
    with pytest.raises(InputError, match="it has dpo, spectral"):
        adapt(tars, weights={"spektral": 0})
    with pytest.raises(InputError, match="negative"):
        adapt(tars, weights={"spectral": -1})
    with pytest.raises(InputError, match="at least one term"):
        adapt(tars, weights={"dpo": 0})


def test_clean_reference_of_perturbed_rows() -> None:
    preset = dataclasses.replace(PRESETS["tars"], ref_text="clean", regularizers=())
    assert plan(preset).policy == (PERTURBED_W, PERTURBED_L)
    assert plan(preset).reference == (W, L)
    policy = {PERTURBED_W: POLICY[W], PERTURBED_L: POLICY[L]}
    loss, _ = vlm_loss(policy, REFERENCE, preset, beta=0.1)
    assert_close(loss, vlm_loss(POLICY, REFERENCE, DPO)[0])


def test_image_variants_can_be_exchanged() -> None:
    masked = with_image(PRESETS["mdpo"], "cropped", "masked")
    assert plan(masked) == plan(PRESETS["mdpo_masked"])
    assert masked.terms == PRESETS["mdpo_masked"].terms
    merged = map_rows(PRESETS["mdpo"], lambda row: row._replace(image="clean"))
    assert merged.terms[1].coefficients == {W: 0.0}
    guided = map_rows(PRESETS["v_dpo"], lambda row: row._replace(text="perturbed"))
    assert {row.text for row in guided.terms[0].frozen} == {"perturbed"}


def test_impossible_presets_are_refused() -> None:
    with pytest.raises(ValueError, match="needs terms"):
        dataclasses.replace(DPO, terms=())
    twice = Term(name="dpo", coefficients={W: 1})
    with pytest.raises(ValueError, match="different names"):
        with_terms(twice, twice)


def test_gradcheck_through_every_kind_of_term() -> None:
    policy, ref = token_tables([W, L])
    preset = with_terms(
        Term(name="a", coefficients={W: 1, L: -1}, loss="preference"),
        Term(name="b", coefficients={W: 1, L: -1}, level="token"),
        Term(name="c", coefficients={W: 1, L: 0.5}, loss="square", offset=0.3),
        Term(
            name="d",
            coefficients={W: 1, L: -1},
            tokens=TokenRule(weighting="segments", average=True),
        ),
        regularizers=(Nll(name="sft", row=W, weight=0.5),),
    )

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        moved = {W: policy[W]._replace(logps=chosen), L: policy[L]._replace(logps=rejected)}
        return vlm_loss(moved, ref, preset)[0]

    inputs = (policy[r].logps.clone().requires_grad_() for r in (W, L))
    assert torch.autograd.gradcheck(loss, tuple(inputs))


def test_finite_at_extreme_log_ratios() -> None:
    for preset in (DPO, PRESETS["mdpo"], PRESETS["mdpo_masked"]):
        policy: Mapping[Row, Tensor] = {
            row: torch.tensor([1e4, -1e4], requires_grad=True) * (-1) ** i
            for i, row in enumerate(plan_rows(preset))
        }
        ref = {row: torch.zeros(2) for row in policy}
        loss, metrics = vlm_loss(policy, ref, preset)
        assert loss.isfinite().all()
        assert all(value.isfinite() for value in metrics.values())
        assert not any(value.requires_grad for value in metrics.values())
