"""What the networks are run on: variants of images and texts, keyed by pair and epoch."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from skimage import data as photographs
from torch import Tensor

from mmalign.adapters import load_vlm
from mmalign.adapters._vlm import VlmFamily
from mmalign.config import VlmModelConfig
from mmalign.objectives.vlm_presets import PRESETS
from mmalign.objectives.vlm_rows import Row, plan
from mmalign.pipelines._vlm_pairs import EncodedPairs, FeatureCache
from mmalign.pipelines._vlm_rows import RowMaker, Sample
from mmalign.types import Branches, ImageRef, VlmPair

FAMILIES = ["llava", "llava_next", "qwen2_5_vl"]
PHOTOS = ("astronaut", "coffee", "chelsea")


def png(name: str) -> ImageRef:
    buffer = io.BytesIO()
    photo = Image.fromarray(getattr(photographs, name)()).convert("RGB")
    photo.crop((50, 50, 250, 250)).resize((60, 40)).save(buffer, "PNG")
    return ImageRef(buffer.getvalue(), name)


def by_length(pictures: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
    return torch.tensor([len(text) / 10 for text in texts])


@pytest.fixture(scope="module")
def make(vlm: Callable[[str], Path]) -> Callable[..., RowMaker]:
    def build(name: str, preset: str, seed: int = 0, photos: Sequence[str] = PHOTOS) -> RowMaker:
        adapter: VlmFamily = load_vlm(VlmModelConfig(model=str(vlm(name)), offline=True), "cpu")
        pairs = [
            VlmPair(
                pair_id=photo,
                prompt="What is in the picture and where?",
                chosen=f"A red circle and {photo}.",
                rejected=f"No blue square and {photo} here.",
                images=(png(photo),),
            )
            for photo in photos
        ]
        encoded = EncodedPairs(pairs, adapter, max_length=None, on_bad_row="stop")

        def own(branches: Branches) -> Tensor:
            return branches.answers[0].flip(0)

        maker = RowMaker(
            adapter,
            encoded,
            FeatureCache(adapter, encoded, 64),
            PRESETS[preset],
            seed=seed,
            similarity=by_length,
            own_answer=own,
        )
        maker.test_pairs, maker.test_adapter = encoded, adapter  # type: ignore[attr-defined]
        return maker

    return build


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("preset", ["tars", "tars_official"])
def test_perturbation_touches_the_users_words_only(
    name: str, preset: str, make: Callable[..., RowMaker]
) -> None:
    maker = make(name, preset)
    pair = maker.test_pairs[0]  # type: ignore[attr-defined]
    protected = maker.test_adapter.chat.special_ids  # type: ignore[attr-defined]
    for epoch in range(3):
        groups = maker.groups(Sample(0, epoch), plan(PRESETS[preset]).policy)
        for group in groups:
            moved = group.prefix_ids != pair.prefix_ids
            assert moved.any()
            assert not (moved & ~pair.prefix_text).any()
            assert not protected & set(group.prefix_ids[moved].tolist())
            for row, ids, scored in zip(group.rows, group.answers, group.scored, strict=True):
                clean = pair.chosen_ids if row.response == "chosen" else pair.rejected_ids
                assert torch.equal(ids != clean, ~scored)
                assert scored.all() == (preset == "tars")
                assert ids[-1] == clean[-1]


def test_official_tars_runs_three_sequences(make: Callable[..., RowMaker]) -> None:
    groups = make("llava", "tars_official").groups(
        Sample(0, 0), plan(PRESETS["tars_official"]).policy
    )
    assert sum(len(group.rows) for group in groups) == 3
    assert len(groups) == 2


def test_draws_are_keyed_by_pair_epoch_and_seed(make: Callable[..., RowMaker]) -> None:
    rows = (Row(image="noised", text="perturbed"),)

    def drawn(number: int, epoch: int, seed: int = 0) -> tuple[str | None, Tensor, Tensor]:
        (group,) = make("llava", "tars_official", seed).groups(Sample(number, epoch), rows)
        features = group.branches.features
        assert features is not None
        return group.key, group.prefix_ids, features.embeds

    first, again = drawn(0, 0), drawn(0, 0)
    assert first[0] == again[0]
    assert torch.equal(first[1], again[1])
    assert torch.equal(first[2], again[2])
    for other in (drawn(0, 1), drawn(0, 0, seed=1)):
        assert other[0] != first[0]
        assert not torch.equal(other[2], first[2])
    clean = [make("llava", "dpo").groups(Sample(0, epoch), (Row(),))[0].key for epoch in range(2)]
    assert clean[0] == clean[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_variants_keep_the_number_of_image_tokens(name: str, make: Callable[..., RowMaker]) -> None:
    maker = make(name, "mdpo_masked")
    (clean,) = maker.groups(Sample(0, 0), (Row(),))
    assert clean.branches.features is not None
    seen = [clean.branches.features.embeds]
    for variant in ("noised", "masked", "cropped", "absent"):
        (group,) = maker.groups(Sample(0, 0), (Row(image=variant),))
        features = group.branches.features
        assert features is not None
        assert features.embeds.shape == seen[0].shape
        assert all((features.embeds - other).abs().max() > 1e-4 for other in seen)
        assert torch.equal(group.prefix_ids, clean.prefix_ids)
        seen.append(features.embeds)
    (other,) = maker.groups(Sample(0, 0), (Row(image="other"),))
    partner = maker.other(Sample(0, 0))
    assert partner.number != 0
    (own,) = maker.groups(partner, (Row(),))
    assert other.branches.features is not None
    assert own.branches.features is not None
    assert torch.equal(other.branches.features.embeds, own.branches.features.embeds)


def test_key_follows_the_other_pairs_image(make: Callable[..., RowMaker]) -> None:
    def shown(*photos: str) -> tuple[str | None, Tensor]:
        maker = make("llava", "mdpo_masked", photos=photos)
        (group,) = maker.groups(Sample(0, 0), (Row(image="other"),))
        assert group.branches.features is not None
        return group.key, group.branches.features.embeds

    (key, embeds), again, other = (
        shown("astronaut", name) for name in ("coffee", "coffee", "chelsea")
    )
    assert again[0] == key
    assert other[0] != key
    assert not torch.equal(other[1], embeds)


def test_own_answers_depend_on_the_policy_and_are_not_cached(
    make: Callable[..., RowMaker],
) -> None:
    maker = make("llava", "povid")
    (group,) = maker.groups(Sample(0, 0), (Row(), Row(response="self")))
    assert group.key is None
    chosen = maker.test_pairs[0].chosen_ids  # type: ignore[attr-defined]
    assert torch.equal(group.answers[1], chosen)  # what comes before each token of it
    assert group.labels[0] is None
    assert group.labels[1] is not None
    assert torch.equal(group.labels[1], chosen.flip(0))
