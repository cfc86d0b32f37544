"""Noising, conversions between what a denoiser may predict, consistency models, sampler steps.

Symbols: `latents` x_0, `noise` epsilon, `noisy_latents` x_t, `alphas_cumprod` alpha-bar (T,). With
a = sqrt(alpha-bar_t) and s = sqrt(1 - alpha-bar_t):

    x_t = a x_0 + s epsilon        velocity v = a epsilon - s x_0

Latents are (B, C, h, w); `timesteps` are scheduler integers (B,) int64. Coefficients are computed
in the wider of the dtypes of `alphas_cumprod`, the latents and float32, and so are the results. A
`prediction_type` other than `epsilon` and `v_prediction` is a ValueError.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction"]
Reduction = Literal["mean", "sum"]


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Noise clean latents to `timesteps`: x_t = a x_0 + s epsilon."""
    a, s = _signal_and_noise(timesteps, alphas_cumprod, latents)
    return a * latents + s * noise


def pred_x0(
    model_output: Tensor,
    noisy_latents: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    prediction_type: PredictionType,
) -> Tensor:
    """Convert a model output to clean latents: (x_t - s epsilon) / a, or a x_t - s v.

    With `epsilon` the result is infinite where alpha-bar is 0 (zero-terminal-SNR schedules).
    """
    a, s = _signal_and_noise(timesteps, alphas_cumprod, noisy_latents)
    if _predicts_noise(prediction_type):
        return (noisy_latents - s * model_output) / a
    return a * noisy_latents - s * model_output


def noise_pred(
    model_output: Tensor,
    noisy_latents: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    prediction_type: PredictionType,
) -> Tensor:
    """Convert a model output to noise: itself, or a v + s x_t."""
    a, s = _signal_and_noise(timesteps, alphas_cumprod, noisy_latents)
    if _predicts_noise(prediction_type):
        return model_output.to(a.dtype)
    return a * model_output + s * noisy_latents


def velocity(latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Compute v = a epsilon - s x_0 (Salimans and Ho 2022, arXiv 2202.00512, section 4)."""
    a, s = _signal_and_noise(timesteps, alphas_cumprod, latents)
    return a * noise - s * latents


def training_target(
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    prediction_type: PredictionType,
) -> Tensor:
    """Return what the model should have predicted: the noise, or the velocity."""
    if _predicts_noise(prediction_type):
        return noise
    return velocity(latents, noise, timesteps, alphas_cumprod)


def denoising_error(model_output: Tensor, target: Tensor) -> Tensor:
    """Compute the mean squared error of each sample over C, h and w, (B,), in float32 at least."""
    dtype = torch.promote_types(
        torch.promote_types(model_output.dtype, target.dtype), torch.float32
    )
    return (model_output.to(dtype) - target.to(dtype)).square().flatten(1).mean(1)


def boundary_scalings(
    timesteps: Tensor, *, timestep_scaling: float = 10.0, sigma_data: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Compute c_skip and c_out of a latent consistency model, (B,) float32 each.

    With u = timestep_scaling * t: c_skip = sigma_data^2 / (u^2 + sigma_data^2) and
    c_out = u / sqrt(u^2 + sigma_data^2), so that f(x, 0) = x (Luo et al. 2023, arXiv 2310.04378;
    the defaults are those of the released checkpoints and of diffusers' `LCMScheduler`).
    """
    u = timesteps.float() * timestep_scaling
    norm = u.square() + sigma_data**2
    return sigma_data**2 / norm, u / norm.sqrt()


def consistency_function(
    model_output: Tensor,
    noisy_latents: Tensor,
    timesteps: Tensor,
    *,
    alphas_cumprod: Tensor,
    prediction_type: PredictionType,
    timestep_scaling: float = 10.0,
) -> Tensor:
    """Compute f = c_skip x_t + c_out x_0, the consistency model's clean latents (B, C, h, w)."""
    x0 = pred_x0(model_output, noisy_latents, timesteps, alphas_cumprod, prediction_type)
    c_skip, c_out = (
        per_sample(c.to(x0), x0)
        for c in boundary_scalings(timesteps, timestep_scaling=timestep_scaling)
    )
    return c_skip * noisy_latents + c_out * x0


class SamplerGrid(NamedTuple):
    """The steps of a sampler in denoising order, (T,) each.

    `timesteps` are what the denoiser sees, `prev_alphas` is alpha-bar after each step.
    """

    timesteps: Tensor
    prev_alphas: Tensor


class Transition(NamedTuple):
    """One sampler step as a Gaussian N(mean, std^2 I) over the next latents.

    `mean` and the clean latents `pred_x0` are (B, C, h, w), `std` is (B,); where it is 0 the step
    is deterministic and has no density.
    """

    mean: Tensor
    std: Tensor
    pred_x0: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """Compute mean + std * noise, (B, C, h, w)."""
        return self.mean + per_sample(self.std, noise) * noise


def ddim_transition(
    model_output: Tensor,
    noisy_latents: Tensor,
    timesteps: Tensor,
    prev_alphas: Tensor,
    *,
    alphas_cumprod: Tensor,
    prediction_type: PredictionType,
    eta: float,
) -> Transition:
    """Take a DDIM step (Song et al. 2020, arXiv 2010.02502, equations 12 and 16).

    With p for the step's end: std = eta sqrt((1 - ap) / (1 - at)) sqrt(1 - at / ap) and
    mean = sqrt(ap) x_0 + sqrt(1 - ap - std^2) epsilon. Guidance is the caller's: `model_output` is
    already guided.

    Args:
        model_output: raw output (B, C, h, w).
        noisy_latents: x_t (B, C, h, w).
        timesteps: t (B,).
        prev_alphas: alpha-bar after the step (B,).
        alphas_cumprod: alpha-bar of the schedule (T,).
        prediction_type: what the model predicts.
        eta: 0 for deterministic DDIM, 1 for the variance of DDPM.
    """
    state = (model_output, noisy_latents, timesteps, alphas_cumprod, prediction_type)
    x0, noise = pred_x0(*state), noise_pred(*state)
    alpha = alphas_cumprod.to(x0)[timesteps.to(x0.device)]
    prev = prev_alphas.to(x0)
    # The last step of some grids ends where it began; rounding must not make that negative.
    variance = ((1 - prev) / (1 - alpha) * (1 - alpha / prev)).clamp(min=0)
    std = eta * variance.sqrt()
    direction = (1 - prev - std.square()).clamp(min=0).sqrt()
    mean = per_sample(prev.sqrt(), x0) * x0 + per_sample(direction, noise) * noise
    return Transition(mean, std, x0)


def consistency_transition(
    model_output: Tensor,
    noisy_latents: Tensor,
    timesteps: Tensor,
    prev_alphas: Tensor,
    *,
    alphas_cumprod: Tensor,
    prediction_type: PredictionType,
    timestep_scaling: float = 10.0,
) -> Transition:
    """Take a multistep consistency step: to f, then noised again to alpha-bar p.

    mean = sqrt(ap) f and std = sqrt(1 - ap) (Luo et al. 2023, arXiv 2310.04378, algorithm 3). The
    last step has ap = 1 and is deterministic. Arguments as in `ddim_transition`.
    """
    clean = consistency_function(
        model_output,
        noisy_latents,
        timesteps,
        alphas_cumprod=alphas_cumprod,
        prediction_type=prediction_type,
        timestep_scaling=timestep_scaling,
    )
    prev = prev_alphas.to(clean)
    return Transition(per_sample(prev.sqrt(), clean) * clean, (1 - prev).sqrt(), clean)


def transition_logp(
    next_latents: Tensor, transition: Transition, *, reduction: Reduction = "mean"
) -> Tensor:
    """Compute the log-density of `next_latents` under a transition, (B,).

    Per element -(x - mean)^2 / (2 std^2) - log std - log sqrt(2 pi), then the mean over C, h and w
    (what the code of DDPO and D3PO takes, so that beta does not depend on the size of the image) or
    their sum (the joint log-density).

    Raises:
        ValueError: If a step is deterministic.
    """
    _must_be_stochastic(transition)
    std = per_sample(transition.std, next_latents)
    scaled = (next_latents - transition.mean) / std
    logp = -0.5 * scaled.square() - std.log() - 0.5 * math.log(2 * math.pi)
    return _reduce(logp, reduction)


def transition_logratio(
    next_latents: Tensor,
    policy: Transition,
    reference: Transition,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute log p_policy - log p_reference of `next_latents` for steps of equal std, (B,).

    <2 x - mu - mu_ref, mu - mu_ref> / (2 std^2): the difference of the log-densities without their
    cancellation, exactly 0 where policy and reference agree.

    Raises:
        ValueError: If a step is deterministic.
    """
    _must_be_stochastic(reference)
    variance = per_sample(reference.std.square(), next_latents)
    middle = 2 * next_latents - policy.mean - reference.mean
    return _reduce(middle * (policy.mean - reference.mean) / (2 * variance), reduction)


class DdimGrid(NamedTuple):
    """The grid of DDIM steps on which a consistency model is distilled; (n,) each, ascending.

    `prev_timesteps[i]` is the timestep before `timesteps[i]` and `alphas_prev[i]` its alpha-bar;
    the first step ends at timestep 0.
    """

    timesteps: Tensor
    prev_timesteps: Tensor
    alphas_prev: Tensor

    def positions(self, timesteps: Tensor) -> Tensor:
        """Find the position of each timestep on the grid, (B,) int64.

        Raises:
            ValueError: If a timestep is not on the grid.
        """
        grid = self.timesteps.to(timesteps.device)
        found = torch.searchsorted(grid, timesteps).clamp(max=len(grid) - 1)
        if not torch.equal(grid[found], timesteps):
            raise ValueError(f"timesteps {timesteps.tolist()} are not all on the DDIM grid")
        return found


def ddim_grid(alphas_cumprod: Tensor, num_steps: int = 50) -> DdimGrid:
    """Lay out the teacher's grid: timesteps k T/n - 1 for k = 1..n (19, 39, ..., 999 by default).

    Raises:
        ValueError: If `num_steps` is not between 1 and T.
    """
    total = len(alphas_cumprod)
    if not 1 <= num_steps <= total:
        raise ValueError(f"num_steps must be between 1 and {total}, got {num_steps}")
    stride = total // num_steps
    steps = torch.arange(1, num_steps + 1, device=alphas_cumprod.device) * stride - 1
    previous = (steps - stride).clamp(min=0)
    return DdimGrid(steps, previous, alphas_cumprod[previous])


def ddim_grid_step(
    pred_x0: Tensor, noise_pred: Tensor, positions: Tensor, grid: DdimGrid
) -> Tensor:
    """Take one deterministic DDIM step to the previous grid point.

    x_prev = sqrt(alpha_prev) x_0 + sqrt(1 - alpha_prev) epsilon (Song et al. 2020, arXiv
    2010.02502, equation 12 with sigma = 0). `positions` (B,) count the grid from 0.
    """
    a, s = _signal_and_noise(positions, grid.alphas_prev, pred_x0)
    return a * pred_x0 + s * noise_pred


def guidance_scale_embedding(omega: Tensor, dim: int = 256) -> Tensor:
    """Embed guidance weights (B,) for a consistency model as sines and cosines, (B, dim) float32.

    `omega` is the weight in x_cond + omega (x_cond - x_uncond), that is the scale of
    classifier-free guidance minus 1. Its thousandfold goes through the frequencies
    10000^(-k / (dim/2 - 1)). diffusers' pipelines have the same function in float32, where the
    angles (thousands of radians) keep about three digits; here they are float64.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float64) / (half - 1)
    # On the CPU: not every accelerator has float64.
    angles = 1000.0 * omega.cpu().double()[:, None] * torch.exp(-math.log(10000.0) * exponents)
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, dim % 2)).to(omega.device, torch.float32)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """View values (B,) so that they multiply rows of `like` (B, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))


def _must_be_stochastic(transition: Transition) -> None:
    if not bool((transition.std > 0).all()):
        raise ValueError("a deterministic sampler step has no density: eta and std must be above 0")


def _reduce(values: Tensor, reduction: Reduction) -> Tensor:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum, got {reduction!r}")
    return values.flatten(1).mean(1) if reduction == "mean" else values.flatten(1).sum(1)


def _predicts_noise(prediction_type: PredictionType) -> bool:
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"prediction_type must be epsilon or v_prediction, got {prediction_type!r}"
        )
    return prediction_type == "epsilon"


def _signal_and_noise(
    timesteps: Tensor, alphas_cumprod: Tensor, like: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(
        torch.promote_types(alphas_cumprod.dtype, like.dtype), torch.float32
    )
    alphas = alphas_cumprod.to(device=like.device, dtype=dtype)[timesteps.to(like.device)]
    alphas = per_sample(alphas, like)
    return alphas.sqrt(), (1 - alphas).sqrt()
