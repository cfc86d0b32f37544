"""Sampling step by step, as every online method does it.

A `Sampler` is a model with prompts, a grid, guidance and eta; it turns latents into a step's
`Transition`. `roll_out` samples and records without gradients, `differentiable_sample` keeps the
graph of the last steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmalign import sharding
from mmalign.diffusion import SamplerGrid, Transition
from mmalign.randomness import Key, keyed_generator
from mmalign.types import Condition, ImageAdapter, Trajectory

Noise = Callable[[int], Tensor]
"""Standard normal noise (B, C, h, w) of the step with this number."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A model and everything it needs to take a step for B prompts.

    Attributes:
        adapter: the model; whether policy or reference runs is decided by the caller.
        condition: encoded prompts, B rows.
        negative: the encoded empty prompt, one row.
        grid: the steps.
        guidance_scale: classifier-free guidance, or the embedded scale of a consistency model.
        eta: stochasticity of DDIM.
        autocast: context of every forward.
    """

    adapter: ImageAdapter
    condition: Condition
    negative: Condition
    grid: SamplerGrid
    guidance_scale: float
    eta: float = 1.0
    autocast: Callable[[], AbstractContextManager[object]] = field(default=nullcontext)

    def __len__(self) -> int:
        """Count the steps."""
        return len(self.grid.timesteps)

    def rows(self, index: Sequence[int] | Tensor) -> Sampler:
        """Keep some of the prompts, in the given order."""
        chosen = torch.as_tensor(index)
        kept = {name: value[chosen.to(value.device)] for name, value in self.condition.items()}
        return replace(self, condition=kept)

    def output(self, latents: Tensor, step: int) -> Tensor:
        """Run the model with guidance; float32 or wider (B, C, h, w)."""
        with self.autocast():
            output = self.adapter.guided_output(
                latents,
                self._timesteps(latents, step),
                self.condition,
                self.negative,
                self.guidance_scale,
            )
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def transition(self, latents: Tensor, step: int) -> Transition:
        """Run the model and take its step as a Gaussian."""
        return self.step(self.output(latents, step), latents, step)

    def step(self, output: Tensor, latents: Tensor, step: int) -> Transition:
        """Take the step that follows from a guided model output."""
        prev = self.grid.prev_alphas[step].repeat(len(latents))
        timesteps = self._timesteps(latents, step)
        return self.adapter.transition(output, latents, timesteps, prev, eta=self.eta)

    def _timesteps(self, latents: Tensor, step: int) -> Tensor:
        return self.grid.timesteps[step].to(latents.device).repeat(len(latents))


def keyed_noise(
    shape: Sequence[int], keys: Sequence[Sequence[Key]], device: torch.device
) -> Tensor:
    """Draw standard normal noise, one row of `shape` per key, independent of the batch."""
    rows = [torch.randn(tuple(shape), generator=keyed_generator(*key)) for key in keys]
    return torch.stack(rows).to(device)


@torch.no_grad()
def roll_out(
    sampler: Sampler, latents: Tensor, noise: Noise, *, first: int = 0, offload: bool = False
) -> Trajectory:
    """Sample from step `first` to the end and record all latents.

    Args:
        sampler: model and prompts.
        latents: x_T, or the latents that step `first` starts from, (B, C, h, w).
        noise: noise of each step; not asked for at deterministic steps.
        first: step to begin with.
        offload: keep the record on the CPU.
    """
    record = [latents]
    for step in range(first, len(sampler)):
        move = sampler.transition(latents, step)
        latents = _advance(move, noise, step)
        record.append(latents)
    return Trajectory([item.cpu() for item in record] if offload else record)


def differentiable_sample(
    sampler: Sampler,
    latents: Tensor,
    noise: Noise,
    *,
    backprop_steps: int,
    checkpointing: bool = True,
) -> tuple[Tensor, list[tuple[int, Tensor, Tensor]]]:
    """Sample with gradients through the last `backprop_steps` steps only.

    Earlier steps build no graph. With `checkpointing` a step's activations are computed again in
    the backward pass, so that memory does not grow with `backprop_steps` but for the latents.

    Returns:
        Clean latents x_0 (B, C, h, w), and (step, latents, model output) of each step with
        gradients, for a divergence from the reference.

    Raises:
        ValueError: If `backprop_steps` is not between 1 and the number of steps.
    """
    if not 1 <= backprop_steps <= len(sampler):
        raise ValueError(f"backprop_steps must be in 1..{len(sampler)}, got {backprop_steps}")
    taken, options = [], sharding.checkpointing()
    for step in range(len(sampler)):
        with torch.set_grad_enabled(step >= len(sampler) - backprop_steps):
            if checkpointing and torch.is_grad_enabled():
                output = checkpoint(sampler.output, latents, step, **options)
            else:
                output = sampler.output(latents, step)
            move = sampler.step(output, latents, step)
            if torch.is_grad_enabled():
                taken.append((step, latents, output))
            latents = _advance(move, noise, step)
    return latents, taken


def _advance(move: Transition, noise: Noise, step: int) -> Tensor:
    """Draw the next latents; a deterministic step asks for no noise."""
    return move.draw(noise(step)) if bool((move.std > 0).any()) else move.mean
