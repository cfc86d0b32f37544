from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from mmalign.objectives import perturb
from mmalign.objectives.perturb import Perturbed
from mmalign.objectives.vlm_rows import PerturbSettings
from mmalign.sequence import IGNORE
from mmalign.types import InputError

# <bos> <image> "USER:" six words "ASSISTANT:" <eos> <pad>
IDS = torch.tensor([1, 9, 20, 30, 31, 32, 33, 34, 35, 21, 2, 0])
WORDS = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0]).bool()
SIMILARITY = torch.tensor([-9, -9, -9, 0.3, 0.1, 0.2, 0.15, 0.25, 0.22, -9, -9, -9])
MASK = 99
REPLACEMENTS = torch.arange(50, 60)
PAPER = PerturbSettings(rule="visual_gap", mode="mask", omega=0.1)
CODE = PerturbSettings(rule="share", mode="replace", share=0.5)


def run(how: PerturbSettings = PAPER, *, seed: int = 0, **changes: Tensor) -> Perturbed:
    return perturb.perturb_tokens(
        changes.get("ids", IDS),
        changes.get("perturbable", WORDS),
        changes.get("similarity", SIMILARITY),
        settings=how,
        mask_id=MASK,
        replacement_ids=REPLACEMENTS,
        generator=perturb.perturb_generator(seed, "sample", 0),
    )


@pytest.mark.parametrize(
    ("omega", "max_share", "want"),
    [
        # The least similar are .1, .15, .2: the gap is .05.
        (0.01, 1.0, [4]),
        (0.06, 1.0, [4, 6]),
        (0.14, 1.0, [4, 5, 6]),
        (0.14, 0.34, [4, 6]),
        (100.0, 1.0, [4, 5, 6, 7, 8]),
        (100.0, 0.01, [4]),
    ],
)
def test_the_paper_takes_the_least_similar_tokens(
    omega: float, max_share: float, want: list[int]
) -> None:
    new, changed = run(PerturbSettings(omega=omega, max_share=max_share))
    assert changed.nonzero()[:, 0].tolist() == want
    assert new[changed].tolist() == [MASK] * len(want)


def test_equal_tokens_go_together_up_to_the_largest_share() -> None:
    flat = torch.full((12,), 0.2)
    assert run(PerturbSettings(max_share=0.5), similarity=flat).changed.sum() == 3


def test_a_share_is_drawn_with_probabilities_that_fall_with_similarity() -> None:
    how = PerturbSettings(rule="share", mode="mask", share=0.2)
    similarity = torch.where(WORDS, torch.tensor(1.0), torch.tensor(0.0))
    similarity[3], similarity[4] = 0.2, 0.6
    drawn = Counter()
    for seed in range(600):
        changed = run(how, seed=seed, similarity=similarity).changed
        assert changed.sum() == 1
        drawn[changed.nonzero().item()] += 1
    assert set(drawn) == {3, 4}
    # Weights .8 and .4; three standard deviations of a share over 600 draws.
    assert drawn[3] / 600 == pytest.approx(2 / 3, abs=3 * math.sqrt(2 / 9 / 600))


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.booleans(), st.floats(-1, 1)), min_size=1, max_size=30
    ),
    st.sampled_from(["visual_gap", "share"]),
    st.sampled_from(["mask", "replace"]),
    st.floats(0.01, 1.0),
    st.integers(0, 5),
)
def test_nothing_but_perturbable_tokens_is_ever_touched(
    tokens: list[tuple[int, bool, float]], rule: str, mode: str, share: float, seed: int
) -> None:
    ids, written, similarity = (torch.tensor(column) for column in zip(*tokens, strict=True))
    protected = {0, 1, 2, 9}
    allowed = perturb.perturbable_tokens(ids, written, protected)
    how = PerturbSettings(rule=rule, mode=mode, share=share, max_share=share)
    if allowed.sum() < 2 or (rule == "share" and bool((similarity[allowed] >= 1).all())):
        with pytest.raises(InputError):
            run(how, ids=ids, perturbable=allowed, similarity=similarity, seed=seed)
        return
    new, changed = run(how, ids=ids, perturbable=allowed, similarity=similarity, seed=seed)
    assert 1 <= changed.sum() < allowed.sum()
    assert not (changed & ~allowed).any()
    assert not torch.isin(ids[changed], torch.tensor(sorted(protected))).any()
    assert torch.equal(new[~changed], ids[~changed])
    assert (new[changed] != ids[changed]).all()


def test_protected_ids_stay_wherever_they_stand() -> None:
    text = torch.ones(12, dtype=torch.bool)
    allowed = perturb.perturbable_tokens(IDS, text, [0, 1, 2, 9])
    assert IDS[~allowed].tolist() == [1, 9, 2, 0]
    assert not (perturb.perturbable_tokens(IDS, WORDS, []) & ~WORDS).any()


def test_draws_depend_on_sample_epoch_and_part_alone() -> None:
    def draw(*keys: object) -> list[bool]:
        return perturb.perturb_tokens(
            IDS,
            WORDS,
            SIMILARITY,
            settings=CODE,
            mask_id=MASK,
            replacement_ids=REPLACEMENTS,
            generator=perturb.perturb_generator(*keys),
        ).ids.tolist()

    first = draw(0, "a", 0)
    torch.manual_seed(5)
    torch.rand(3)
    assert draw(0, "a", 0) == first
    others = [draw(1, "a", 0), draw(0, "b", 0), draw(0, "a", 1), draw(0, "a", 0, "chosen")]
    assert first not in others


def test_replacements_differ_from_what_they_replace() -> None:
    how = PerturbSettings(rule="visual_gap", mode="replace", omega=100, max_share=1.0)
    ids = torch.where(WORDS, torch.tensor(55), IDS)
    for seed in range(50):
        new, changed = run(how, seed=seed, ids=ids)
        assert torch.isin(new[changed], REPLACEMENTS).all()
        assert (new[changed] != 55).all()
    with pytest.raises(ValueError, match="two replacement"):
        perturb.perturb_tokens(
            IDS,
            WORDS,
            SIMILARITY,
            settings=how,
            mask_id=MASK,
            replacement_ids=REPLACEMENTS[:1],
            generator=torch.Generator(),
        )


@pytest.mark.parametrize("left", [0, 1])
def test_removing_every_perturbable_token_is_refused(left: int) -> None:
    words = torch.zeros(12, dtype=torch.bool)
    words[3 : 3 + left] = True
    with pytest.raises(InputError, match=f"the sample: {left} tokens may be perturbed"):
        run(perturbable=words)


def test_similarities_must_be_usable() -> None:
    with pytest.raises(InputError, match="not finite"):
        run(similarity=SIMILARITY.clone().fill_(math.nan))
    with pytest.raises(InputError, match="similarity 1"):
        run(CODE, similarity=torch.ones(12))


def test_perturbed_answers_are_not_scored() -> None:
    labels = torch.tensor([IGNORE, 5, 6])
    changed = torch.tensor([True, False, True])
    assert perturb.unscored(labels, changed).tolist() == [IGNORE, 5, IGNORE]


def test_similarity_is_a_cosine() -> None:
    image, tokens = torch.tensor([3.0, 4.0]), torch.tensor([[6.0, 8.0], [4.0, -3.0], [0.0, 2.0]])
    assert_close(perturb.token_similarity(image, tokens), torch.tensor([1.0, 0.0, 0.8]))
    sharp = perturb.token_similarity(image, tokens, softmax=True)
    assert_close(sharp, torch.tensor([100.0, 0.0, 80.0]).softmax(0))


def test_the_similarity_of_the_code_makes_its_choice_nearly_random() -> None:
    cosine = 0.2 + 0.02 * torch.randn(80, generator=torch.Generator().manual_seed(0))
    weights = 1 - (100 * cosine).softmax(0)
    assert 1 <= (weights < 0.9 * weights.mean()).sum() <= 3
    plain = 1 - cosine
    assert not (plain < 0.9 * plain.mean()).any()
