"""Preference losses on log-ratios, the same for every method that estimates log-ratios.

With r = log pi_policy - log pi_ref of a side and `margin` h = r_chosen - r_rejected, each function
maps pairs (B,) to losses (B,) and reduces nothing. `beta` has the unit of one over a log-ratio;
its scale is the calling method's. Losses and gradients are finite for log-ratios up to +-1e4.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from mmalign.config import PreferenceConfig
from mmalign.types import InputError, LogRatios

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
Metrics = dict[str, Tensor]

EXPONENT_LIMIT = 30.0
"""Beyond this exponent exp is continued by its tangent: finite, convex, with a useful gradient."""


def preference_loss(
    logratios: LogRatios,
    *,
    beta: float,
    config: PreferenceConfig,
    score_margins: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Apply the configured loss to each pair.

    Args:
        logratios: log-ratios of chosen and rejected, (B,) each; half precision is widened to
        float32.
        beta: strength of the pull to the reference, in units of one over a log-ratio.
        config: `loss_type` and the constants of its family member.
        score_margins: score of chosen minus score of rejected (B,), for `offset`.

    Returns:
        Losses (B,), and metrics as detached scalars: means over the batch of the implicit rewards
        beta * r (`rewards/chosen`, `rewards/rejected`, `rewards/margin`), of the margin before beta
        (`margin`), and `rewards/accuracy`, the share of pairs with a positive margin in which a
        margin of exactly 0 (policy equal to reference) counts one half.

    Raises:
        InputError: If the config is out of range, or `offset` lacks a score margin of some pair.
    """
    ratios = LogRatios(*(_at_least_float32(side) for side in logratios))
    loss = _dispatch(ratios, beta, config, score_margins)
    return loss, preference_metrics(ratios, beta=beta)


def preference_metrics(logratios: LogRatios, *, beta: float) -> Metrics:
    """Compute the metrics of `preference_loss`."""
    chosen, rejected = (side.detach() for side in logratios)
    margin = chosen - rejected
    return {
        "rewards/chosen": beta * chosen.mean(),
        "rewards/rejected": beta * rejected.mean(),
        "rewards/margin": beta * margin.mean(),
        "rewards/accuracy": accuracy(margin),
        "margin": margin.mean(),
    }


def accuracy(margin: Tensor) -> Tensor:
    """Compute the share of positive margins; a margin of exactly 0 counts one half."""
    return (0.5 + 0.5 * margin.detach().sign()).mean()


def sigmoid_loss(margin: Tensor, beta: float) -> Tensor:
    """Compute -log sigmoid(beta h): DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7)."""
    return -logsigmoid(beta * margin)


def ipo_loss(margin: Tensor, beta: float) -> Tensor:
    """Compute (h - 1 / (2 beta))^2: IPO (Azar et al. 2023, arXiv 2310.12036, equation 17).

    `beta` is the paper's tau; the loss has the unit of a squared log-ratio.
    """
    return (margin - 0.5 / beta).square()


def hinge_loss(margin: Tensor, beta: float) -> Tensor:
    """Compute max(0, 1 - beta h): SLiC-HF (Zhao et al. 2023, arXiv 2305.10425) on log-ratios."""
    return relu(1 - beta * margin)


def robust_loss(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Compute the unbiased loss under flipped labels: rDPO.

    Chowdhury et al. 2024, arXiv 2403.00409. With e = `label_smoothing`, the share of flipped
    labels, and l(h) = -log sigmoid(beta h): ((1 - e) l(h) - e l(-h)) / (1 - 2 e). Its mean over
    noisy labels equals the mean of l over clean ones, which the label smoothing of cDPO, (1 - e)
    l(h) + e l(-h), is not. It is unbounded below as the margin grows.

    Raises:
        InputError: If `label_smoothing` is not in [0, 0.5).
    """
    if not 0 <= label_smoothing < 0.5:
        raise InputError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    kept = (1 - label_smoothing) * sigmoid_loss(margin, beta)
    flipped = label_smoothing * sigmoid_loss(-margin, beta)
    return (kept - flipped) / (1 - 2 * label_smoothing)


def offset_loss(margin: Tensor, beta: float, offsets: Tensor) -> Tensor:
    """Compute -log sigmoid(beta h - offset): ODPO (Amini et al. 2024, arXiv 2402.10571).

    `offsets` (B,) are in nats: how much larger the chosen side's implicit reward should be. The
    paper scales the logarithm of the score margin; `preference_loss` scales the score margin
    itself, which also holds for margins below 0.
    """
    return -logsigmoid(beta * margin - offsets)


def divergence_loss(
    logratios: LogRatios, beta: float, divergence: Divergence, alpha: float
) -> Tensor:
    """Compute -log sigmoid(beta (f'(u_chosen) - f'(u_rejected))), u = exp(r): f-DPO.

    Wang et al. 2023, arXiv 2309.16240, table 1. The reverse KL is DPO itself.

    Raises:
        InputError: If `divergence` is `alpha` and `alpha` is not in (0, 1).
    """
    chosen, rejected = (_derivative(side, divergence, alpha) for side in logratios)
    return -logsigmoid(beta * (chosen - rejected))


def reverse_kl_derivative(logratio: Tensor) -> Tensor:
    """Compute f'(u) - f'(1) = log u, of f(u) = u log u."""
    return logratio


def forward_kl_derivative(logratio: Tensor) -> Tensor:
    """Compute f'(u) - f'(1) = 1 - 1/u, of f(u) = -log u."""
    return -_expm1(-logratio)


def js_derivative(logratio: Tensor) -> Tensor:
    """Compute f'(u) - f'(1) = log(2u / (1 + u)), of f(u) = u log u - (u + 1) log((u + 1) / 2).

    Written as r/2 - log cosh(r/2), which keeps all digits near r = 0.
    """
    size = logratio.abs()
    return (logratio - size) / 2 - torch.log1p(torch.expm1(-size) / 2)


def alpha_derivative(logratio: Tensor, alpha: float) -> Tensor:
    """Compute f'(u) - f'(1) = (1 - u^-alpha) / alpha, between reverse KL (0) and forward KL (1).

    It belongs to f(u) = (u^(1 - alpha) - (1 - alpha) u - alpha) / (alpha (alpha - 1)).

    Raises:
        InputError: If `alpha` is not in (0, 1).
    """
    if not 0 < alpha < 1:
        raise InputError(f"alpha must be in (0, 1), got {alpha}")
    return -_expm1(-alpha * logratio) / alpha


def _dispatch(
    ratios: LogRatios, beta: float, config: PreferenceConfig, score_margins: Tensor | None
) -> Tensor:
    margin = ratios.chosen - ratios.rejected
    match config.loss_type:
        case "sigmoid":
            return sigmoid_loss(margin, beta)
        case "ipo":
            return ipo_loss(margin, beta)
        case "hinge":
            return hinge_loss(margin, beta)
        case "robust":
            return robust_loss(margin, beta, config.label_smoothing)
        case "offset":
            return offset_loss(margin, beta, _offsets(score_margins, margin, config.offset_scale))
        case "reverse_kl" | "forward_kl" | "js" | "alpha":
            return divergence_loss(ratios, beta, config.loss_type, config.alpha)
        case unknown:
            raise InputError(f"unknown loss_type {unknown!r}")


def _derivative(logratio: Tensor, divergence: Divergence, alpha: float) -> Tensor:
    match divergence:
        case "reverse_kl":
            return reverse_kl_derivative(logratio)
        case "forward_kl":
            return forward_kl_derivative(logratio)
        case "js":
            return js_derivative(logratio)
        case "alpha":
            return alpha_derivative(logratio, alpha)


def _offsets(score_margins: Tensor | None, like: Tensor, scale: float) -> Tensor:
    if score_margins is None or not bool(score_margins.isfinite().all()):
        raise InputError(
            "loss_type offset needs the score margin of every pair: add score_chosen and"
            " score_rejected to the pairs, or use another loss_type"
        )
    return scale * score_margins.to(like)


def _expm1(exponent: Tensor) -> Tensor:
    # expm1 rather than exp: differences of log-ratios near 0 keep all their digits.
    limit = torch.as_tensor(EXPONENT_LIMIT, dtype=exponent.dtype, device=exponent.device)
    return torch.expm1(exponent.clamp(max=EXPONENT_LIMIT)) + limit.exp() * relu(exponent - limit)


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
