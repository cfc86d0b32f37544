"""How far a trained model is from its base, along the sampler's steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from mmalign.config import LoraConfig, ReferenceConfig, RunConfig, SamplingConfig
from mmalign.objectives.rocm import transition_divergence
from mmalign.reference import Reference, make_reference
from mmalign.rollout import Sampler, keyed_noise

TRAJECTORIES = 16
Autocast = Callable[[], AbstractContextManager[object]]


def base_of(config: RunConfig, adapter: Any, reference: Reference) -> Reference | None:
    """Find the untrained model; None after full fine-tuning with a reference that moved."""
    if config.lora.enabled:
        return make_reference(adapter, LoraConfig(), ReferenceConfig())
    return reference if config.reference_update == "never" else None


@torch.no_grad()
def kl_to_base(
    adapter: Any,
    base: Reference,
    prompts: Sequence[str],
    sampling: SamplingConfig,
    autocast: Autocast = nullcontext,
) -> float:
    """Estimate the divergence of the policy's trajectories from the base's, in nats per element.

        KL = mean over trajectories of sum_t mean over elements |mu_t - mu_base,t|^2 / (2 std_t^2)

    Trajectories are the policy's own, sampled by the family's stochastic sampler (DDIM at eta 1,
    or multistep consistency sampling), whatever eta the evaluation has; both models take every step
    from the same latents, so each term is the exact KL of two Gaussians. Multiplied by the number
    of latent elements the sum is the KL of the joint distribution of the trajectories. Steps
    without noise have no density and do not count. The noise is keyed by the sampling seed.

    Args:
        adapter: the model, its denoiser the policy.
        base: what it is compared with.
        prompts: taken in turn until there are `TRAJECTORIES`.
        sampling: steps, guidance, size, batch size and seed.
        autocast: context of every forward.

    Returns:
        0 for an untrained policy.
    """
    training = adapter.denoiser.training
    adapter.denoiser.eval()
    try:
        rows = list(enumerate(islice(cycle(prompts), TRAJECTORIES)))
        parts = [
            _batch(adapter, base, rows[start : start + sampling.batch_size], sampling, autocast)
            for start in range(0, len(rows), sampling.batch_size)
        ]
    finally:
        adapter.denoiser.train(training)
    return float(torch.cat(parts).mean())


def _batch(
    adapter: Any,
    base: Reference,
    rows: Sequence[tuple[int, str]],
    sampling: SamplingConfig,
    autocast: Autocast,
) -> Tensor:
    """Walk some trajectories to the end; returns their divergences (B,)."""
    shape = adapter.latent_shape(sampling.height, sampling.width)
    factor = adapter.pixels_per_latent
    size = {"height": shape[1] * factor, "width": shape[2] * factor}
    sampler = Sampler(
        adapter=adapter,
        condition=adapter.encode_condition([prompt for _, prompt in rows], **size),
        negative=adapter.encode_condition([""], **size),
        grid=adapter.sampler_grid(sampling.num_inference_steps),
        guidance_scale=sampling.guidance_scale,
        autocast=autocast,
    )

    def noise(purpose: str | int) -> Tensor:
        keys = [(sampling.seed, "kl", index, purpose) for index, _ in rows]
        return keyed_noise(shape, keys, adapter.device)

    latents, total = noise("start"), torch.zeros(len(rows), device=adapter.device)
    for step in range(len(sampler)):
        policy = sampler.transition(latents, step)
        if not bool((policy.std > 0).all()):
            latents = policy.mean
            continue
        with base.active():
            reference = sampler.transition(latents, step)
        drawn = noise(step)
        total += transition_divergence(policy, reference, drawn, divergence="kl")
        latents = policy.draw(drawn)
    return total
