"""Consistency DPO: the Con-DPO loss of Curriculum-DPO (Croitoru et al. 2024, arXiv 2405.13637).

For a latent consistency model f(x, t) = c_skip(t) x + c_out(t) x_0(x, t, guidance), one step of the
teacher's DDIM solver from the noisy latents gives `next_latents`, and the frozen reference there
gives the target. With d a pseudo-Huber distance to that target, d' the same for the reference:

    loss = -log sigmoid( -beta [ (d_chosen - d'_chosen) - (d_rejected - d'_rejected) ] )

There is no half here: beta is 200 in the paper, and its unit is one over a distance. Timestep,
noise and guidance are shared by both sides. As in the authors' code the target comes from the
frozen reference, not from a moving average; unlike it, log(sigmoid) is computed stably.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mmalign import diffusion
from mmalign.config import PreferenceConfig
from mmalign.diffusion import DdimGrid, PredictionType
from mmalign.objectives.errors import error_logratios, error_metrics
from mmalign.objectives.preference import preference_loss


class TeacherStep(NamedTuple):
    """Where one solver step of the teacher ends: latents (B, C, h, w) and timesteps (B,)."""

    next_latents: Tensor
    next_timesteps: Tensor


def pseudo_huber_distance(prediction: Tensor, target: Tensor, *, huber_c: float = 1e-3) -> Tensor:
    """Compute the mean over C, h and w of sqrt(d^2 + c^2) - c with d = prediction - target, (B,).

    Song and Dhariwal 2023, arXiv 2310.14189, section 3.3, per element as in the authors' code.
    Computed as d^2 / (sqrt(d^2 + c^2) + c), equal and exact for small d too.

    Raises:
        ValueError: If `huber_c` is not positive.
    """
    if huber_c <= 0:
        raise ValueError(f"huber_c must be positive, got {huber_c}")
    squared = (prediction - target).square()
    return (squared / ((squared + huber_c**2).sqrt() + huber_c)).flatten(1).mean(1)


def teacher_step(
    cond_output: Tensor,
    uncond_output: Tensor,
    noisy_latents: Tensor,
    timesteps: Tensor,
    guidance_scale: Tensor,
    *,
    alphas_cumprod: Tensor,
    prediction_type: PredictionType,
    grid: DdimGrid,
) -> TeacherStep:
    """Take one guided DDIM step of the teacher, whose end the target is computed at.

    Guidance acts on x_0 and on the noise: y_uncond + g (y_cond - y_uncond). The target is then
    `consistency_function` of the reference at `next_latents` and `next_timesteps`.

    Args:
        cond_output: raw output of the teacher with the prompt (B, C, h, w).
        uncond_output: the same with the empty prompt.
        noisy_latents: latents the teacher saw.
        timesteps: scheduler integers (B,), on the grid.
        guidance_scale: g (B,), in the units of classifier-free guidance; the papers' omega is g -
        1.
        alphas_cumprod: the teacher's schedule (T,).
        prediction_type: what the teacher predicts.
        grid: the teacher's steps.

    Raises:
        ValueError: If a timestep is not on the grid.
    """
    # Both conversions are affine in the model output, so guiding it guides x_0 and the noise alike.
    scale = diffusion.per_sample(guidance_scale.to(cond_output), cond_output)
    output = uncond_output + scale * (cond_output - uncond_output)
    state = (noisy_latents, timesteps, alphas_cumprod, prediction_type)
    positions = grid.positions(timesteps)
    next_latents = diffusion.ddim_grid_step(
        diffusion.pred_x0(output, *state), diffusion.noise_pred(output, *state), positions, grid
    )
    return TeacherStep(next_latents, grid.prev_timesteps.to(timesteps.device)[positions])


def consistency_dpo_loss(
    policy_distance: Tensor,
    ref_distance: Tensor,
    *,
    beta: float,
    preference: PreferenceConfig,
    score_margins: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of each pair from distances to the target.

    Args:
        policy_distance: distances of the policy (2B,), `[chosen; rejected]`.
        ref_distance: distances of the reference (2B,); treated as constants.
        beta: strength of the pull to the reference, in units of one over a distance; 200 in the
        paper.
        preference: the loss on log-ratios.
        score_margins: score of chosen minus score of rejected (B,), for the `offset` loss.

    Returns:
        Losses (B,), and the metrics of `preference_loss` with the four mean distances, named
        `denoising_error/...` like those of Diffusion-DPO.

    Raises:
        ValueError: If the distances are not both (2B,).
        InputError: If the preference config is out of range or needs score margins.
    """
    loss, metrics = preference_loss(
        error_logratios(policy_distance, ref_distance),
        beta=beta,
        config=preference,
        score_margins=score_margins,
    )
    return loss, {**metrics, **error_metrics(policy_distance, ref_distance)}
