"""Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908).

With m the denoising error of the policy and r that of the reference, at one timestep and one noise
shared by both sides of a pair, equation 14 of the paper is

    loss = -log sigmoid( -beta' [ (m_chosen - r_chosen) - (m_rejected - r_rejected) ] )

The paper's T * omega(lambda_t) is a constant inside beta'. The authors' code (Salesforce) has
beta' = beta / 2; diffusers' example script for SD 1.5 has beta' = beta, so its 2500 equals their
5000. Errors are means over C, h and w, not sums, which also is part of beta's scale. Unlike
diffusers' script, `ipo` works, and every other member of the preference family too.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from mmalign.config import PreferenceConfig
from mmalign.objectives.errors import error_logratios, error_metrics
from mmalign.objectives.preference import preference_loss

BetaConvention = Literal["salesforce", "diffusers"]
_FACTOR: dict[BetaConvention, float] = {"salesforce": 0.5, "diffusers": 1.0}


def diffusion_dpo_loss(
    policy_error: Tensor,
    ref_error: Tensor,
    *,
    beta: float,
    beta_convention: BetaConvention = "salesforce",
    preference: PreferenceConfig,
    score_margins: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of each pair from denoising errors.

    Args:
        policy_error: denoising errors of the policy (2B,), `[chosen; rejected]`.
        ref_error: denoising errors of the reference (2B,); treated as constants.
        beta: strength of the pull to the reference, in units of one over a mean squared error;
            2000 to 5000 in the authors' runs.
        beta_convention: `salesforce` multiplies the error difference by beta / 2, `diffusers` by
        beta.
        preference: the loss on log-ratios.
        score_margins: score of chosen minus score of rejected (B,), for the `offset` loss.

    Returns:
        Losses (B,), and the metrics of `preference_loss` (implicit rewards include the half of
        `salesforce`) with the four mean denoising errors.

    Raises:
        ValueError: If the errors are not both (2B,).
        InputError: If the preference config is out of range or needs score margins.
    """
    loss, metrics = preference_loss(
        error_logratios(policy_error, ref_error),
        beta=beta * _FACTOR[beta_convention],
        config=preference,
        score_margins=score_margins,
    )
    return loss, {**metrics, **error_metrics(policy_error, ref_error)}
