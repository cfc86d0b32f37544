"""Noising, conversions between what a denoiser may predict, and the scalings of consistency models.

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
