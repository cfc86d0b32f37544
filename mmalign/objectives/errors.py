"""From denoising errors of both networks to log-ratios and metrics.

Errors are (2B,), ordered `[chosen; rejected]`. A lower error stands for a higher log-probability,
so `-(policy error - reference error)` is the log-ratio of a side up to the unit that beta carries.
"""

from __future__ import annotations

from torch import Tensor

from mmalign.types import LogRatios


def split_pairs(values: Tensor) -> tuple[Tensor, Tensor]:
    """Split (2B, ...) into its chosen and rejected halves.

    Raises:
        ValueError: If the number of rows is odd.
    """
    if len(values) % 2:
        raise ValueError(f"expected [chosen; rejected] of equal length, got {len(values)} rows")
    half = len(values) // 2
    return values[:half], values[half:]


def error_logratios(policy_error: Tensor, ref_error: Tensor) -> LogRatios:
    """Compute the log-ratios -(policy_error - ref_error) of each side, (B,) each.

    The reference's errors are constants: no gradient flows to them.

    Raises:
        ValueError: If the errors are not both (2B,).
    """
    if policy_error.shape != ref_error.shape or policy_error.ndim != 1:
        shapes = f"{tuple(policy_error.shape)} and {tuple(ref_error.shape)}"
        raise ValueError(f"policy and reference errors must both be (2B,), got {shapes}")
    return LogRatios(*split_pairs(ref_error.detach() - policy_error))


def error_metrics(policy_error: Tensor, ref_error: Tensor | None = None) -> dict[str, Tensor]:
    """Average errors of each network and side: `denoising_error/policy_chosen` and so on."""
    metrics = {}
    for network, error in (("policy", policy_error), ("ref", ref_error)):
        if error is not None:
            chosen, rejected = split_pairs(error.detach())
            metrics[f"denoising_error/{network}_chosen"] = chosen.mean()
            metrics[f"denoising_error/{network}_rejected"] = rejected.mean()
    return metrics
