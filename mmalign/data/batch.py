"""Batches of pairs: latents, noise, timesteps and conditions, every draw keyed by what it is for.

Noise, timestep, guidance and caption dropout are drawn once per pair and used by both sides, as the
methods require. The sampled latents of an image and its view (plain or mirrored) are drawn per
side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmalign.randomness import derive_seed, keyed_generator
from mmalign.types import Condition, InputError

if TYPE_CHECKING:
    from mmalign.data.cache import EncodedPair
    from mmalign.data.order import StepIndex

Item = TypeVar("Item", covariant=True)
FRESH_DRAW = -1
"""Number of a draw that is made for one step only and never comes again."""


class PairBatch(NamedTuple):
    """B pairs ready for a denoiser; tensors of 2B rows are ordered `[chosen; rejected]`.

    Attributes:
        pair_ids: ids of the pairs.
        latents: scaled clean latents (2B, C, h, w), float32 at least.
        noise: noise (2B, C, h, w); both halves are equal.
        timesteps: scheduler timesteps (2B,) int64; both halves are equal.
        condition: condition of 2B rows; the empty prompt's where the caption was dropped.
        empty_condition: the empty prompt's condition, 2B rows.
        guidance_scale: guidance scales (2B,) float32; both halves are equal.
        margins: score margins of the pairs (B,) float32, NaN where unknown.
        draws: number of each pair's draw, `FRESH_DRAW` when draws are not fixed. With fixed draws a
            pair's rows are a function of (pair id, draw), and so are the reference's errors.
    """

    pair_ids: tuple[str, ...]
    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    condition: Condition
    empty_condition: Condition
    guidance_scale: Tensor
    margins: Tensor
    draws: tuple[int, ...]

    def to(self, device: torch.device | str) -> PairBatch:
        """Move every tensor to `device`."""
        return PairBatch(
            pair_ids=self.pair_ids,
            latents=self.latents.to(device),
            noise=self.noise.to(device),
            timesteps=self.timesteps.to(device),
            condition=_move(self.condition, device),
            empty_condition=_move(self.empty_condition, device),
            guidance_scale=self.guidance_scale.to(device),
            margins=self.margins.to(device),
            draws=self.draws,
        )


class MapStyle(Protocol[Item]):
    """What can be indexed by position: a list, cached pairs, live pairs."""

    def __len__(self) -> int:
        """Count the items."""
        ...

    def __getitem__(self, index: int, /) -> Item:
        """Return one item."""
        ...


class StepDataset(Dataset[tuple[int, Item]]):
    """A map-style dataset indexed by (optimizer step, index), as batch samplers here yield them."""

    def __init__(self, pairs: MapStyle[Item]) -> None:
        """Wrap cached or live pairs."""
        self.pairs = pairs

    def __len__(self) -> int:
        """Count the pairs."""
        return len(self.pairs)

    def __getitem__(self, key: StepIndex) -> tuple[int, Item]:
        """Return the step with the pair, for `PairCollator`."""
        step, index = key
        return step, self.pairs[index]


class PairCollator:
    """Draws what is random about pairs and stacks them.

    With `num_draws` 0, draws are keyed by (seed, step, pair id, purpose). Otherwise each pair has
    `num_draws` fixed draws keyed by (seed, k, pair id, purpose), where k is drawn per step. So
    what a pair gets does not depend on the other pairs of its batch, on the order, or on a resume.
    """

    def __init__(
        self,
        *,
        seed: int,
        timesteps: Sequence[int],
        empty_condition: Condition,
        caption_dropout: float = 0.0,
        num_draws: int = 0,
        guidance_range: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        """Set what draws are made from.

        Args:
            seed: base seed of all draws.
            timesteps: the timesteps to draw from, such as `range(1000)` or a teacher's grid.
            empty_condition: condition of the empty prompt without batch dim. Entries that it
                lacks, such as image sizes, are kept when a caption is dropped.
            caption_dropout: share of pairs trained with the empty prompt.
            num_draws: number of fixed draws per pair; 0 draws afresh at every step.
            guidance_range: smallest and largest guidance scale.

        Raises:
            InputError: If one of them is out of range.
        """
        if not timesteps:
            raise InputError("there are no timesteps to draw from")
        if not 0 <= caption_dropout <= 1:
            raise InputError(f"caption_dropout must be between 0 and 1, got {caption_dropout}")
        if num_draws < 0:
            raise InputError(f"num_draws must not be negative, got {num_draws}")
        if guidance_range[0] > guidance_range[1]:
            raise InputError(f"min_guidance must not be over max_guidance, got {guidance_range}")
        self.seed = seed
        self.timesteps = timesteps
        self.empty_condition = empty_condition
        self.caption_dropout = caption_dropout
        self.num_draws = num_draws
        self.guidance_range = guidance_range

    def __call__(self, items: Sequence[tuple[int, EncodedPair]]) -> PairBatch:
        """Draw and stack the pairs of one batch, each given with its optimizer step."""
        samples = [self._sample(step, pair) for step, pair in items]
        pairs = [pair for _, pair in items]
        margins = [float("nan") if pair.margin is None else pair.margin for pair in pairs]
        return PairBatch(
            pair_ids=tuple(pair.pair_id for pair in pairs),
            latents=torch.stack([s.chosen for s in samples] + [s.rejected for s in samples]),
            noise=_both([s.noise for s in samples]),
            timesteps=_both([torch.tensor(s.timestep) for s in samples]),
            condition=_stack([s.condition for s in samples]),
            empty_condition=_stack([s.empty_condition for s in samples]),
            guidance_scale=_both([torch.tensor(s.guidance_scale) for s in samples]),
            margins=torch.tensor(margins),
            draws=tuple(s.draw for s in samples),
        )

    def _sample(self, step: int, pair: EncodedPair) -> _Sample:
        draw, draws = self._draws(step, pair.pair_id)
        chosen = draws.latents(pair.chosen_mean, pair.chosen_std, "chosen")
        rejected = draws.latents(pair.rejected_mean, pair.rejected_std, "rejected")
        low, high = self.guidance_range
        empty = {**pair.condition, **self.empty_condition}
        dropped = draws.uniform("caption") < self.caption_dropout
        return _Sample(
            chosen=chosen,
            rejected=rejected,
            noise=draws.normal(chosen, "noise"),
            timestep=self.timesteps[draws.integer(len(self.timesteps), "timestep")],
            condition=empty if dropped else pair.condition,
            empty_condition=empty,
            guidance_scale=low + (high - low) * draws.uniform("guidance"),
            draw=draw,
        )

    def _draws(self, step: int, pair_id: str) -> tuple[int, _Draws]:
        if self.num_draws == 0:
            return FRESH_DRAW, _Draws(self.seed, "step", step, pair_id)
        draw = derive_seed(self.seed, step, pair_id, "draw") % self.num_draws
        return draw, _Draws(self.seed, "draw", draw, pair_id)


class _Sample(NamedTuple):
    """What was drawn for one pair, without batch dim."""

    chosen: Tensor
    rejected: Tensor
    noise: Tensor
    timestep: int
    condition: Condition
    empty_condition: Condition
    guidance_scale: float
    draw: int


class _Draws(NamedTuple):
    """Random values of one pair at one step, or of one of its fixed draws."""

    seed: int
    kind: str
    number: int
    pair_id: str

    def normal(self, like: Tensor, purpose: str) -> Tensor:
        return torch.randn(like.shape, generator=self._generator(purpose)).to(like)

    def uniform(self, purpose: str) -> float:
        return torch.rand((), generator=self._generator(purpose)).item()

    def integer(self, high: int, purpose: str) -> int:
        return int(torch.randint(high, (), generator=self._generator(purpose)).item())

    def latents(self, mean: Tensor, std: Tensor, side: str) -> Tensor:
        """Sample one view of (V, C, h, w) latent moments."""
        view = self.integer(len(mean), f"view {side}")
        dtype = torch.promote_types(mean.dtype, torch.float32)
        center, spread = mean[view].to(dtype), std[view].to(dtype)
        return center + spread * self.normal(center, f"latents {side}")

    def _generator(self, purpose: str) -> torch.Generator:
        return keyed_generator(self.seed, self.kind, self.number, self.pair_id, purpose)


def _both(rows: list[Tensor]) -> Tensor:
    return torch.stack(rows + rows)


def _stack(rows: list[Condition]) -> Condition:
    return {name: _both([row[name] for row in rows]) for name in rows[0]}


def _move(condition: Condition, device: torch.device | str) -> Condition:
    return {name: tensor.to(device) for name, tensor in condition.items()}
