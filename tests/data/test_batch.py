from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from mmalign.data.batch import FRESH_DRAW, PairBatch, PairCollator, StepDataset
from mmalign.data.order import BatchPlan, StepSampler
from mmalign.types import Condition, InputError

EMPTY = {"prompt_embeds": torch.full((3, 5), -1.0)}


class Encoded(NamedTuple):
    pair_id: str
    prompt: str
    chosen_mean: Tensor
    chosen_std: Tensor
    rejected_mean: Tensor
    rejected_std: Tensor
    condition: Condition
    margin: float | None


def encoded(name: str, *, views: int = 1, std: float = 0.0, margin: float | None = 1.0) -> Encoded:
    """A pair whose latents tell side and view: chosen 10, 11 and rejected 20, 21."""
    chosen = torch.stack([torch.full((4, 2, 2), 10.0 + v) for v in range(views)])
    return Encoded(
        pair_id=name,
        prompt=name,
        chosen_mean=chosen,
        chosen_std=torch.full_like(chosen, std),
        rejected_mean=chosen + 10,
        rejected_std=torch.full_like(chosen, std),
        condition={"prompt_embeds": torch.full((3, 5), float(len(name)))},
        margin=margin,
    )


def collator(**changes: object) -> PairCollator:
    options = {
        "seed": 5,
        "timesteps": range(1000),
        "empty_condition": EMPTY,
        "guidance_range": (5.0, 15.0),
        **changes,
    }
    return PairCollator(**options)


def rows(batch: PairBatch, position: int) -> list[Tensor]:
    """Everything one pair got."""
    size = len(batch.pair_ids)
    pick = torch.tensor([position, position + size])
    tensors = [batch.latents, batch.noise, batch.timesteps, batch.guidance_scale]
    return [t[pick] for t in (*tensors, batch.condition["prompt_embeds"])]


def test_layout() -> None:
    batch = collator()([(0, encoded("a")), (0, encoded("bb", margin=None))])
    assert batch.pair_ids == ("a", "bb")
    assert batch.latents.shape == batch.noise.shape == (4, 4, 2, 2)
    assert batch.latents[:, 0, 0, 0].tolist() == [10, 10, 20, 20]
    assert batch.timesteps.shape == batch.guidance_scale.shape == (4,)
    assert batch.timesteps.dtype == torch.int64
    assert batch.condition["prompt_embeds"][:, 0, 0].tolist() == [1, 2, 1, 2]
    assert (batch.empty_condition["prompt_embeds"] == -1).all()
    assert batch.empty_condition["prompt_embeds"].shape == (4, 3, 5)
    assert batch.margins[0].item() == 1.0
    assert math.isnan(batch.margins[1].item())
    assert batch.draws == (FRESH_DRAW, FRESH_DRAW)


def test_both_sides_share_noise_timestep_guidance_and_caption_dropout() -> None:
    items = [(step, encoded(name, std=1.0)) for step in range(10) for name in ("a", "bb", "ccc")]
    batch = collator(caption_dropout=0.5)(items)
    for values in (
        batch.noise,
        batch.timesteps,
        batch.guidance_scale,
        batch.condition["prompt_embeds"],
    ):
        chosen, rejected = values.chunk(2)
        assert_close(chosen, rejected, rtol=0, atol=0)
        assert len(chosen.flatten(1).unique(dim=0) if chosen.ndim > 1 else chosen.unique()) > 1
    chosen, rejected = batch.latents.chunk(2)
    assert not torch.allclose(chosen - 10, rejected - 20)


def test_pairs_do_not_depend_on_their_batch() -> None:
    names = ["a", "bb", "ccc", "dddd"]
    options = {"caption_dropout": 0.5}
    items = [(7, encoded(name, views=2, std=1.0)) for name in names]
    together = collator(**options)(items)
    backwards = collator(**options)(items[::-1])
    for position, item in enumerate(items):
        alone = collator(**options)([item])
        for got, reverse, want in zip(
            rows(together, position), rows(backwards, 3 - position), rows(alone, 0), strict=True
        ):
            assert_close(got, want, rtol=0, atol=0)
            assert_close(reverse, want, rtol=0, atol=0)


def test_steps_pairs_and_seeds_draw_differently() -> None:
    base = collator()([(0, encoded("a"))])
    for other in (
        collator()([(1, encoded("a"))]),
        collator()([(0, encoded("b"))]),
        collator(seed=6)([(0, encoded("a"))]),
    ):
        assert not torch.allclose(base.noise, other.noise)
        assert base.guidance_scale[0] != other.guidance_scale[0]


def test_resume_at_every_step_draws_the_same() -> None:
    pairs = StepDataset([encoded(name, views=2, std=0.5) for name in ("a", "bb", "ccc")])

    def batches(start_step: int) -> list[PairBatch]:
        plan = BatchPlan(seed=0, batch_size=2, max_steps=6, start_step=start_step)
        loader = torch.utils.data.DataLoader(
            pairs,
            batch_sampler=StepSampler(len(pairs), plan),
            collate_fn=collator(caption_dropout=0.3),
        )
        torch.manual_seed(start_step)
        return list(loader)

    whole = batches(0)
    for start in range(1, 7):
        for got, want in zip(batches(start), whole[start:], strict=True):
            assert got.pair_ids == want.pair_ids
            for position in range(2):
                for a, b in zip(rows(got, position), rows(want, position), strict=True):
                    assert_close(a, b, rtol=0, atol=0)


def test_fixed_draws_come_back_and_are_complete() -> None:
    fixed = collator(num_draws=3, caption_dropout=0.5)
    pair = encoded("a", views=2, std=1.0)
    seen: dict[int, list[Tensor]] = {}
    for step in range(30):
        batch = fixed([(step, pair)])
        got = rows(batch, 0)
        for a, b in zip(got, seen.setdefault(batch.draws[0], got), strict=True):
            assert_close(a, b, rtol=0, atol=0)
    assert set(seen) == {0, 1, 2}
    assert len({tuple(values[2].tolist()) for values in seen.values()}) == 3
    other = [fixed([(step, encoded("b"))]).draws[0] for step in range(30)]
    assert other != [fixed([(step, pair)]).draws[0] for step in range(30)]


def test_timesteps_come_from_the_choices() -> None:
    batch = collator(timesteps=[19, 39, 999])([(step, encoded("a")) for step in range(60)])
    assert set(batch.timesteps.tolist()) == {19, 39, 999}


def test_draws_have_their_distributions() -> None:
    batch = collator(caption_dropout=0.25)(
        [(step, encoded("a", views=2, std=2.0)) for step in range(400)]
    )
    dropped = (batch.condition["prompt_embeds"][:400, 0, 0] == -1).double().mean()
    assert dropped.item() == pytest.approx(0.25, abs=0.07)
    assert batch.guidance_scale.min() >= 5
    assert batch.guidance_scale.max() <= 15
    assert batch.guidance_scale.mean().item() == pytest.approx(10, abs=0.5)
    assert batch.timesteps.double().mean().item() == pytest.approx(499.5, abs=50)
    assert batch.noise[:400].mean().item() == pytest.approx(0, abs=0.06)
    assert batch.noise.std().item() == pytest.approx(1, abs=0.05)
    assert batch.latents[:400].mean().item() == pytest.approx(10.5, abs=0.15)
    assert batch.latents[:400].std().item() == pytest.approx((4 + 0.25) ** 0.5, abs=0.1)


def test_views_are_drawn_per_side() -> None:
    batch = collator()([(step, encoded("a", views=2)) for step in range(50)])
    chosen, rejected = (side[:, 0, 0, 0] for side in batch.latents.chunk(2))
    assert set(chosen.tolist()) == {10, 11}
    assert {(c, r - 10) for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)} == {
        (10, 10),
        (10, 11),
        (11, 10),
        (11, 11),
    }


@pytest.mark.parametrize(("caption_dropout", "value"), [(0.0, 1.0), (1.0, -1.0)])
def test_dropped_captions_keep_what_the_empty_prompt_lacks(
    caption_dropout: float, value: float
) -> None:
    pair = encoded("a")
    pair.condition["time_ids"] = torch.arange(6.0)
    batch = collator(caption_dropout=caption_dropout)([(0, pair)])
    assert (batch.condition["prompt_embeds"] == value).all()
    assert_close(batch.condition["time_ids"], torch.arange(6.0).repeat(2, 1))
    assert_close(batch.empty_condition["time_ids"], torch.arange(6.0).repeat(2, 1))


def test_half_precision_moments_are_widened() -> None:
    pair = encoded("a", std=0.5)
    half = pair._replace(**{n: getattr(pair, n).half() for n in pair._fields[2:6]})
    batch = collator()([(0, half)])
    assert batch.latents.dtype == batch.noise.dtype == torch.float32
    assert_close(batch.latents, collator()([(0, pair)]).latents)


def test_to_moves_every_tensor() -> None:
    batch = collator()([(0, encoded("a"))]).to("meta")
    tensors = [value for value in batch if isinstance(value, Tensor)]
    tensors += [*batch.condition.values(), *batch.empty_condition.values()]
    assert len(tensors) == 7
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert batch.pair_ids == ("a",)
    assert batch.draws == (FRESH_DRAW,)


@pytest.mark.parametrize(
    "change",
    [
        {"timesteps": []},
        {"caption_dropout": 1.5},
        {"num_draws": -1},
        {"guidance_range": (7.0, 5.0)},
    ],
)
def test_options_out_of_range_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(InputError):
        collator(**change)
