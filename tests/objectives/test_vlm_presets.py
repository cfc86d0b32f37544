"""Every preset: reference numbers, rows it needs, value and gradient at policy = reference."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mmalign.config import VlmDpoConfig
from mmalign.objectives.tars import Hidden
from mmalign.objectives.vlm import Extras, Preset, Row, TokenRule, plan, vlm_loss
from mmalign.objectives.vlm_presets import (
    ABSENT_L,
    ABSENT_W,
    MASKED_REVISED,
    MASKED_W,
    NOISED_PERTURBED_W,
    NOISED_W,
    OTHER,
    OTHER_IMAGE_OTHER,
    OTHER_IMAGE_W,
    PERTURBED_L,
    PERTURBED_W,
    PRESETS,
    REVISED,
    SELF,
    L,
    W,
    find_preset,
)
from mmalign.sequence import TokenLogps
from mmalign.types import InputError

every_preset = pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)


def value(number: float) -> Tensor:
    return torch.tensor([number], dtype=torch.float64)


# The log-probs with which the reference numbers were made; log-ratios 2, -2 and -1.
NUMBERS = {"chosen": (-40, -42), "rejected": (-55, -53), "worse image": (-48, -47)}


def tables(rows: dict[Row, str]) -> tuple[dict[Row, Tensor], dict[Row, Tensor]]:
    policy = {row: value(NUMBERS[name][0]) for row, name in rows.items()}
    return policy, {row: value(NUMBERS[name][1]) for row, name in rows.items()}


PAIR = {W: "chosen", L: "rejected"}
KL = Extras(token_kl={W: value(1.5), L: value(2.5)})


@pytest.mark.parametrize("name", ["dpo", "rlaif_v", "llava_hound"])
def test_reference_number_of_dpo(name: str) -> None:
    loss, _ = vlm_loss(*tables(PAIR), PRESETS[name])
    assert loss.item() == pytest.approx(0.5130153, abs=5e-8)


@pytest.mark.parametrize(("name", "image"), [("mdpo", "cropped"), ("mdpo_masked", "masked")])
def test_reference_number_of_mdpo(name: str, image: str) -> None:
    rows = {**PAIR, Row(image=image): "worse image"}
    loss, _ = vlm_loss(*tables(rows), PRESETS[name])
    assert loss.item() == pytest.approx(1.66551, abs=5e-6)


@pytest.mark.parametrize(
    ("cross_modal", "token_kl", "golden"),
    [
        (False, False, 0.51302),
        (False, True, 0.51704),
        (True, False, 0.40319),
        (True, True, 0.40652),
    ],
)
def test_reference_numbers_of_chip(cross_modal: bool, token_kl: bool, golden: float) -> None:
    preset = PRESETS["chip_fused"]
    term = preset.terms[0]
    if not cross_modal:
        term = dataclasses.replace(term, coefficients={W: 1, L: -1})
    if not token_kl:
        term = dataclasses.replace(term, kl={})
    preset = dataclasses.replace(preset, terms=(term,))
    loss, metrics = vlm_loss(*tables({**PAIR, NOISED_W: "worse image"}), preset, extras=KL)
    assert loss.item() == pytest.approx(golden, abs=5e-6)
    assert metrics["rewards/chosen"].item() == pytest.approx(0.2)
    assert metrics["rewards/margin"].item() == pytest.approx(0.4)


def test_token_kl_of_the_chosen_answer_is_a_constant() -> None:
    kl = {row: value(n).requires_grad_() for row, n in ((W, 1.5), (L, 2.5))}
    rows = tables({**PAIR, NOISED_W: "worse image"})
    for name in ("chip_fused", "chip"):
        preset = PRESETS[name]
        terms = tuple(dataclasses.replace(t, tokens=None) for t in preset.terms)
        preset = dataclasses.replace(preset, terms=terms)
        loss, _ = vlm_loss(*rows, preset, extras=Extras(token_kl=kl))
        down, hold = torch.autograd.grad(loss, (kl[L], kl[W]), allow_unused=True)
        assert down.item() > 0
        assert hold is None or not hold.any()


def test_separate_chip_adds_its_losses_up() -> None:
    preset = PRESETS["chip"]
    policy, ref = tables({**PAIR, NOISED_W: "worse image"})
    mask = torch.ones(1, 4, dtype=torch.bool)

    def tokens(table: dict[Row, Tensor]) -> dict[Row, TokenLogps]:
        changed = torch.tensor([[True, False, False, False]])
        share = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
        return {row: TokenLogps(v[:, None] * share, mask, changed) for row, v in table.items()}

    loss, metrics = vlm_loss(tokens(policy), tokens(ref), preset, extras=KL)
    # Changed tokens carry 0.4 of each log-prob: (0.6 + 4 * 0.4) / (3 + 4) of it.
    share = (0.6 + 4 * 0.4) / 7
    softplus = [math.log(1 + math.exp(-0.5 * h)) for h in (4, 3, share * 4)]
    assert loss.item() == pytest.approx(
        softplus[0] + softplus[1] + 3 * softplus[2] + 0.1 * 0.5 * (2.5 - 1.5)
    )
    assert metrics["loss/segment"].item() == pytest.approx(softplus[2])


def test_reference_number_of_tars_code() -> None:
    rows = {
        PERTURBED_W: "chosen",
        PERTURBED_L: "rejected",
        NOISED_PERTURBED_W: "worse image",
    }
    preset = PRESETS["tars_official"]
    plain = dataclasses.replace(preset, regularizers=())
    loss, metrics = vlm_loss(*tables(rows), plain)
    assert loss.item() == pytest.approx(1.0674, abs=5e-5)
    assert metrics["loss/dpo"].item() == pytest.approx(0.5130, abs=5e-5)
    assert metrics["loss/visual"].item() == pytest.approx(0.5544, abs=5e-5)
    # With embeddings whose triplet loss is 2.036, and its weight 0.1.
    count = torch.arange(12, dtype=torch.float64).reshape(1, 4, 3)
    mask = torch.ones(1, 4, dtype=torch.bool)
    a, b, c = (Hidden(t, mask) for t in (count.sin(), (count + 0.1).sin(), count.cos()))
    extras = Extras(embeddings={PERTURBED_W: a}, ref_embeddings={W: c, L: b})
    full, _ = vlm_loss(*tables(rows), preset, extras=extras)
    assert (full - loss).item() == pytest.approx(0.2036, abs=5e-5)


def test_tars_of_the_paper() -> None:
    preset = PRESETS["tars"]
    energies = Extras(
        log_energy={PERTURBED_W: value(1.2), PERTURBED_L: value(0.4)},
        ref_log_energy={W: value(1.0), L: value(0.9)},
    )
    rows = tables({PERTURBED_W: "chosen", PERTURBED_L: "rejected"})
    loss, metrics = vlm_loss(*rows, preset, extras=energies)
    dpo, spectral = math.log(1 + math.exp(-4)), math.log(1 + math.exp(-(0.2 + 0.5)))
    assert loss.item() == pytest.approx(dpo + 0.1 * spectral)
    assert metrics["loss/spectral"].item() == pytest.approx(spectral)


def test_povid_halves_two_comparisons() -> None:
    loss, _ = vlm_loss(*tables({**PAIR, SELF: "worse image"}), PRESETS["povid"])
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-0.4)) + 0.5543552) / 2, abs=1e-7)


def test_guidance_of_v_dpo_moves_only_the_rows_with_the_image() -> None:
    preset = PRESETS["v_dpo"]
    assert plan(preset).frozen == (ABSENT_W, ABSENT_L)
    rows = {W: "chosen", L: "rejected", ABSENT_W: "worse image", ABSENT_L: "worse image"}
    policy, ref = tables(rows)
    policy = {row: logps.requires_grad_() for row, logps in policy.items()}
    loss, _ = vlm_loss(policy, ref, preset)
    loss.sum().backward()
    # 1.5 * 2 - 0.5 * (-1) against 1.5 * (-2) - 0.5 * (-1).
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.1 * 6)))
    assert policy[W].grad.item() == -policy[L].grad.item() < 0
    assert policy[ABSENT_W].grad is None
    assert policy[ABSENT_L].grad is None


def test_sympo_is_symmetric_in_its_two_images() -> None:
    numbers = {W: 2.0, L: -2.0, OTHER: -1.0, OTHER_IMAGE_W: -0.5, OTHER_IMAGE_OTHER: 3.0}
    zero = {row: value(0) for row in numbers}
    loss, metrics = vlm_loss({r: value(n) for r, n in numbers.items()}, zero, PRESETS["sympo"])
    softplus = [math.log(1 + math.exp(-0.1 * h)) for h in (4, 3, 3.5, 2, 3)]
    want = softplus[0] + 0.5 * (softplus[1] + softplus[2]) + softplus[3] + softplus[4]
    assert loss.item() == pytest.approx(want + 1e-4 * (0.1 * (3 - 3.5)) ** 2)
    swapped = dict(numbers)
    for a, b in ((W, OTHER_IMAGE_OTHER), (OTHER, OTHER_IMAGE_W)):
        swapped[a], swapped[b] = numbers[b], numbers[a]
    _, other = vlm_loss({r: value(n) for r, n in swapped.items()}, zero, PRESETS["sympo"])
    for one, two in (("pair", "pair_other"), ("anchor", "anchor_other"), ("margin", "margin")):
        assert_close(metrics[f"loss/{one}"], other[f"loss/{two}"])


def opa_tokens(numbers: dict[Row, list[float]]) -> dict[Row, TokenLogps]:
    return {
        row: TokenLogps(
            torch.tensor([n], dtype=torch.float64), torch.ones(1, len(n), dtype=torch.bool)
        )
        for row, n in numbers.items()
    }


OPA_NUMBERS = {
    W: [0.5, 1.0, -0.2],
    L: [-1.0, 0.3],
    REVISED: [0.4, 0.1],
    MASKED_W: [-0.3, 0.2, -0.6],
    MASKED_REVISED: [0.0, -0.5],
}


def test_opa_of_whole_answers() -> None:
    policy = opa_tokens(OPA_NUMBERS)
    zero = {row: t._replace(logps=torch.zeros_like(t.logps)) for row, t in policy.items()}
    loss, _ = vlm_loss(policy, zero, PRESETS["opa"])
    r = {row: sum(numbers) for row, numbers in OPA_NUMBERS.items()}
    arguments = [
        (1, r[W] - r[L]),
        (1, r[REVISED] - r[L]),
        (0.2, r[W] - r[MASKED_W]),
        (0.2, r[REVISED] - r[MASKED_REVISED]),
        (1, r[W]),
        (1, r[REVISED]),
    ]
    want = sum(weight * math.log(1 + math.exp(-0.1 * h)) for weight, h in arguments)
    assert loss.item() == pytest.approx(want)


def test_opa_of_the_code_is_per_position_with_its_anchor() -> None:
    policy = opa_tokens(OPA_NUMBERS)
    zero = {row: t._replace(logps=torch.zeros_like(t.logps)) for row, t in policy.items()}
    loss, _ = vlm_loss(policy, zero, PRESETS["opa_token_level"])

    def mean(*rows: tuple[float, Row]) -> float:
        width = max(len(OPA_NUMBERS[row]) for _, row in rows)
        padded = [[s * x for x in OPA_NUMBERS[row]] + [0.0] * width for s, row in rows]
        sums = [sum(column) for column in zip(*(p[:width] for p in padded), strict=True)]
        return sum(math.log(1 + math.exp(-0.1 * h)) for h in sums) / width

    want = (
        mean((1, W), (-1, L))
        + mean((1, REVISED), (-1, L))
        + 0.2 * mean((1, W), (-1, MASKED_W))
        + 0.2 * mean((1, REVISED), (-1, MASKED_REVISED))
        + 2 * mean((1, W))
        + 2 * mean((-1, REVISED))
    )
    assert loss.item() == pytest.approx(want)


@pytest.mark.parametrize(
    ("name", "policy", "reference"),
    [
        ("dpo", 2, 2),
        ("mpo", 2, 2),
        ("simpo", 2, 0),
        ("rlhf_v", 2, 2),
        ("mdpo", 3, 3),
        ("chip", 3, 3),
        ("chip_fused", 3, 3),
        ("povid", 3, 3),
        ("v_dpo", 4, 4),
        ("sympo", 5, 5),
        ("opa", 5, 5),
        ("opa_token_level", 5, 5),
        ("tars", 2, 2),
        ("tars_official", 3, 3),
    ],
)
def test_number_of_rows(name: str, policy: int, reference: int) -> None:
    planned = plan(PRESETS[name])
    assert (len(planned.policy), len(planned.reference)) == (policy, reference)


def test_extras_are_planned() -> None:
    assert set(plan(PRESETS["chip"]).token_kl) == {W, L}
    assert set(plan(PRESETS["chip_fused"]).token_kl) == {W, L}
    assert plan(PRESETS["tars"]).hidden == (PERTURBED_W, PERTURBED_L)
    assert plan(PRESETS["tars"]).ref_hidden == (W, L)
    official = plan(PRESETS["tars_official"])
    assert official.embeddings == (PERTURBED_W,)
    assert official.ref_embeddings == (W, L)
    assert official.hidden == official.ref_hidden == ()


def inputs(preset: Preset, noise: float) -> tuple[dict[Row, TokenLogps], dict[Row, TokenLogps]]:
    """Random tokens for every row; policy and reference differ by `noise`."""
    generator = torch.Generator().manual_seed(0)
    planned = plan(preset)
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    policy, ref = {}, {}
    for row in dict.fromkeys((*planned.policy, *planned.reference)):
        logps = -torch.rand(2, 4, generator=generator, dtype=torch.float64)
        other = noise * torch.randn(2, 4, generator=generator, dtype=torch.float64)
        changed = torch.tensor([[True, False, False, False]] * 2)
        policy[row] = TokenLogps(logps * mask, mask, changed)
        ref[row] = TokenLogps((logps + other) * mask, mask, changed)
    return policy, ref


def extras(preset: Preset) -> Extras:
    planned = plan(preset)
    mask = torch.ones(2, 3, dtype=torch.bool)

    def states(row: Row) -> Hidden:
        shift = len(row.text) + len(row.response)
        return Hidden(torch.arange(12, dtype=torch.float64).add(shift).sin().reshape(2, 3, 2), mask)

    ones = torch.ones(2, dtype=torch.float64)
    return Extras(
        token_kl=dict.fromkeys(planned.token_kl, ones),
        log_energy=dict.fromkeys(planned.hidden, ones),
        ref_log_energy=dict.fromkeys(planned.ref_hidden, ones),
        embeddings={row: states(row) for row in planned.embeddings},
        ref_embeddings={row: states(row) for row in planned.ref_embeddings},
    )


@pytest.mark.parametrize("name", [n for n, p in PRESETS.items() if not p.reference_free])
def test_terms_at_policy_equal_to_reference(name: str) -> None:
    preset = PRESETS[name]
    plain = dataclasses.replace(preset, regularizers=())
    loss, metrics = vlm_loss(*inputs(preset, 0), plain, extras=extras(preset))
    parts = [0.0 if t.loss == "square" else t.weight * math.log(2) for t in preset.terms]
    if preset.name == "mpo":
        parts[1] *= 2  # The quality term compares each answer with the reference.
    assert_close(loss, torch.full_like(loss, sum(parts)))
    assert metrics["margin"].item() == 0
    assert metrics["rewards/accuracy"].item() == 0.5


@every_preset
def test_gradcheck(preset: Preset) -> None:
    policy, ref = inputs(preset, 0.5)
    rows = [row for row in plan(preset).policy if row not in plan(preset).frozen]

    def loss(*logps: Tensor) -> Tensor:
        moved = {row: policy[row]._replace(logps=v) for row, v in zip(rows, logps, strict=True)}
        return vlm_loss({**policy, **moved}, ref, preset, extras=extras(preset))[0]

    leaves = tuple(policy[row].logps.clone().requires_grad_() for row in rows)
    assert torch.autograd.gradcheck(loss, leaves)


@every_preset
def test_literals_are_complete(preset: Preset) -> None:
    assert PRESETS[preset.name] is preset
    assert preset.beta > 0
    assert re.search(r"arXiv \d{4}\.\d{5}|[Cc]ode of", preset.source)
    loss, metrics = vlm_loss(*inputs(preset, 0.5), preset, extras=extras(preset))
    assert loss.shape == (2,)
    assert not any(value.requires_grad for value in metrics.values())


def test_presets_by_name_and_mode() -> None:
    assert find_preset("tars") is find_preset("tars", "paper") is PRESETS["tars"]
    assert find_preset("tars", "official") is PRESETS["tars_official"]
    assert find_preset("chip", "separate") is PRESETS["chip"]
    assert find_preset("chip", "fused") is PRESETS["chip_fused"]
    assert find_preset("mdpo", "masked") is PRESETS["mdpo_masked"]
    assert find_preset("opa", "token_level").terms[0].level == "token"
    assert find_preset("rlhf_v").tokens == TokenRule(weighting="segments", average=True, gamma=5.0)
    with pytest.raises(InputError, match="did you mean mdpo"):
        find_preset("mdop")
    with pytest.raises(InputError, match="modes: paper, official"):
        find_preset("tars", "papre")
    with pytest.raises(InputError, match="modes: none"):
        find_preset("dpo", "paper")


def test_help_names_every_preset() -> None:
    assert all(f"`{name}`" in (VlmDpoConfig.__doc__ or "") for name in PRESETS)
