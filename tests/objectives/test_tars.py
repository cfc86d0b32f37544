from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mmalign.objectives.perturb import unscored
from mmalign.objectives.tars import Hidden, log_energy, spectral_ratio, spectral_triplet
from mmalign.objectives.vlm import Extras, Row, plan, vlm_loss
from mmalign.objectives.vlm_presets import NOISED_PERTURBED_W, PERTURBED_L, PERTURBED_W, PRESETS
from mmalign.objectives.vlm_presets import L as CLEAN_L
from mmalign.objectives.vlm_presets import W as CLEAN_W
from mmalign.sequence import IGNORE, TokenLogps, token_logps

COUNT = torch.arange(12, dtype=torch.float64).reshape(4, 3)
SINE, SHIFTED, COSINE = COUNT.sin(), (COUNT + 0.1).sin(), COUNT.cos()


def one(*sequences: Tensor) -> Hidden:
    """A batch of sequences, padded with garbage that must not matter."""
    width = max(len(s) for s in sequences)
    states = torch.full((len(sequences), width, sequences[0].shape[1]), 7.0, dtype=torch.float64)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for i, sequence in enumerate(sequences):
        states[i, : len(sequence)] = sequence
        mask[i, : len(sequence)] = True
    return Hidden(states, mask)


def test_reference_numbers_of_the_triplet() -> None:
    # Distances .0198 (sine, shifted) and 1.5559 (sine, cosine).
    near = spectral_triplet(one(SINE), one(SHIFTED), one(COSINE), margin=0.5)
    far = spectral_triplet(one(SINE), one(COSINE), one(SHIFTED), margin=0.5)
    assert near.item() == 0
    assert far.item() == pytest.approx(2.036, abs=5e-4)
    no_margin = spectral_triplet(one(SINE), one(COSINE), one(SHIFTED), margin=0.0)
    assert no_margin.item() == pytest.approx(1.5559 - 0.0198, abs=1e-4)
    same = spectral_triplet(one(SINE), one(SHIFTED), one(SINE), margin=0.0)
    assert same.item() == pytest.approx(0.0198, abs=5e-5)


def test_triplet_does_not_see_rotated_tokens() -> None:
    rolled = spectral_triplet(one(SINE), one(SINE.roll(1, 0)), one(SINE), margin=0.5)
    assert rolled.item() == pytest.approx(0.5, abs=1e-12)


def test_batches_and_padding_change_nothing() -> None:
    pairs = [(SINE, SHIFTED[:3], COSINE), (COSINE[:2], SINE, SHIFTED[:3])]
    alone = torch.cat([spectral_triplet(*(one(s) for s in triple)) for triple in pairs])
    together = spectral_triplet(*(one(*batch) for batch in zip(*pairs, strict=True)))
    assert_close(together, alone)
    assert_close(
        log_energy(one(SINE, COSINE[:2])),
        torch.cat([log_energy(one(SINE)), log_energy(one(COSINE[:2]))]),
    )


def test_shorter_sequences_are_compared_at_the_frequencies_of_the_longest() -> None:
    padded = torch.cat([SINE, torch.zeros(2, 3, dtype=torch.float64)])
    longer = torch.cat([COSINE, COSINE[:2]])
    assert_close(
        spectral_triplet(one(SINE), one(longer), one(SHIFTED)),
        spectral_triplet(one(padded), one(longer), one(torch.cat([SHIFTED, padded[4:]]))),
    )


def test_energy_equals_its_definition() -> None:
    total = 0.0
    for k in range(4):
        for d in range(3):
            part = sum(SINE[n, d].item() * math.cos(2 * math.pi * k * n / 4) for n in range(4))
            total += part**2
    assert log_energy(one(SINE)).item() == pytest.approx(math.log(total / 12))
    assert_close(log_energy(one(3 * SINE)), log_energy(one(SINE)) + 2 * math.log(3))


def test_ratio_is_logistic_in_log_energies() -> None:
    numbers = [torch.tensor([x], dtype=torch.float64) for x in (1.5, 0.2, 1.0, 0.9)]
    want = math.log(1 + math.exp(-2 * ((1.5 - 1.0) - (0.2 - 0.9))))
    assert spectral_ratio(*numbers, beta=2).item() == pytest.approx(want)
    zero = torch.zeros(1)
    assert spectral_ratio(zero, zero, zero, zero, beta=1).item() == pytest.approx(math.log(2))


def test_gradcheck() -> None:
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    anchor = torch.stack([SINE, COSINE]).requires_grad_()
    others = [Hidden(torch.stack(s), mask) for s in ((COSINE, SINE), (SHIFTED, SHIFTED))]
    assert torch.autograd.gradcheck(
        lambda z: spectral_triplet(Hidden(z, mask), *others, margin=0.7), (anchor,)
    )
    assert torch.autograd.gradcheck(lambda z: log_energy(Hidden(z, mask)), (anchor,))


def test_only_the_policy_gets_a_gradient() -> None:
    leaves = [t.clone().requires_grad_() for t in (SINE, COSINE, SHIFTED)]
    hidden = [Hidden(t[None], torch.ones(1, 4, dtype=torch.bool)) for t in leaves]
    spectral_triplet(*hidden).sum().backward()
    assert leaves[0].grad.any()
    assert leaves[1].grad is None
    assert leaves[2].grad is None
    energies = [torch.ones(1, requires_grad=True) for _ in range(4)]
    spectral_ratio(*energies, beta=1).sum().backward()
    assert [e.grad is not None for e in energies] == [True, True, False, False]


def test_finite_without_signal_and_at_extremes() -> None:
    nothing = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 4, dtype=torch.bool)
    loss = spectral_triplet(Hidden(nothing[None], mask), one(SINE), one(COSINE)).sum()
    (loss + log_energy(Hidden(nothing[None], mask)).sum()).backward()
    assert loss.isfinite()
    assert nothing.grad.isfinite().all()
    huge = torch.tensor([1e4])
    assert spectral_ratio(huge, -huge, huge * 0, huge * 0, beta=1).isfinite()
    assert spectral_ratio(-huge, huge, huge * 0, huge * 0, beta=1).isfinite()


class ToyModel:
    """A causal language model on running means of embeddings, with one image vector."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.embed = torch.randn(11, 6, generator=generator, dtype=torch.float64)
        self.head = torch.randn(11, 6, generator=generator, dtype=torch.float64)
        self.forwards = 0

    def embeddings(self, ids: Tensor, image: Tensor) -> Tensor:
        return torch.cat([image[None], self.embed[ids]])

    def logps(self, ids: Tensor, labels: Tensor, image: Tensor) -> TokenLogps:
        self.forwards += 1
        states = self.embeddings(ids, image)
        running = states.cumsum(0) / torch.arange(1, len(states) + 1)[:, None]
        target = torch.cat([torch.tensor([IGNORE]), labels])
        return token_logps((running @ self.head.T)[None], target[None])


def test_three_forwards_give_the_numbers_of_the_six() -> None:
    policy, reference = ToyModel(1), ToyModel(2)
    policy.embed.requires_grad_()
    image = torch.linspace(-1, 1, 6, dtype=torch.float64)
    noisy = 0.86302 * image + 0.50517 * image.flip(0)
    prompt = torch.tensor([4, 5, 6])
    texts, labels = {}, {}
    for response, answer in (("chosen", [7, 8, 9]), ("rejected", [8, 7, 10])):
        clean = torch.cat([prompt, torch.tensor(answer)])
        changed = torch.tensor([False, True, False, False, False, True])
        texts[response, "clean"] = clean
        texts[response, "perturbed"] = clean.masked_fill(changed, 2)
        scored = torch.cat([torch.full((3,), IGNORE), torch.tensor(answer)])
        labels[response] = unscored(scored, changed)

    def sums(model: ToyModel, response: str, text: str, picture: Tensor) -> Tensor:
        return model.logps(texts[response, text], labels[response], picture).logps.sum()

    # The authors' way: six sequences through each network, five of them used by neither loss.
    six = [
        ("chosen", "perturbed", image),
        ("rejected", "perturbed", image),
        ("chosen", "clean", image),
        ("rejected", "clean", image),
        ("chosen", "perturbed", noisy),
        ("rejected", "perturbed", noisy),
    ]
    log_probs = [[sums(model, *row) for row in six] for model in (policy, reference)]
    r = [p - q for p, q in zip(*log_probs, strict=True)]
    spectra = [
        torch.fft.fft(model.embeddings(texts[response, text], image), dim=0).abs()
        for model, response, text in (
            (policy, "chosen", "perturbed"),
            (reference, "chosen", "clean"),
            (reference, "rejected", "clean"),
        )
    ]
    near, far = ((spectra[0] - s).square().mean() for s in spectra[1:])
    want = (
        -torch.nn.functional.logsigmoid(0.1 * (r[0] - r[1]))
        - torch.nn.functional.logsigmoid(0.1 * (r[0] - r[4]))
        + 0.1 * torch.relu(near - far + 0.5)
    )
    want_grad = torch.autograd.grad(want, policy.embed)[0]
    assert (policy.forwards, reference.forwards) == (6, 6)

    # Ours: what the plan asks for.
    policy.forwards = reference.forwards = 0
    planned = plan(PRESETS["tars_official"])
    assert set(planned.policy) == {PERTURBED_W, PERTURBED_L, NOISED_PERTURBED_W}

    def run(model: ToyModel, row: Row) -> TokenLogps:
        picture = noisy if row.image == "noised" else image
        return model.logps(texts[row.response, row.text], labels[row.response], picture)

    def embedded(model: ToyModel, row: Row) -> Hidden:
        states = model.embeddings(texts[row.response, row.text], image)
        return Hidden(states[None], torch.ones(1, len(states), dtype=torch.bool))

    loss, _ = vlm_loss(
        {row: run(policy, row) for row in planned.policy},
        {row: run(reference, row) for row in planned.reference},
        PRESETS["tars_official"],
        extras=Extras(
            embeddings={row: embedded(policy, row) for row in planned.embeddings},
            ref_embeddings={row: embedded(reference, row) for row in planned.ref_embeddings},
        ),
    )
    assert planned.ref_embeddings == (CLEAN_W, CLEAN_L)
    assert (policy.forwards, reference.forwards) == (3, 3)
    assert_close(loss[0], want)
    assert_close(torch.autograd.grad(loss.sum(), policy.embed)[0], want_grad)
