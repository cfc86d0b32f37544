"""Preference losses on log-ratios, the same for every method that estimates log-ratios.

With r = log pi_policy - log pi_ref of a side and `margin` h = r_chosen - r_rejected, each function
maps pairs (B,) to losses (B,) and reduces nothing. `beta` has the unit of one over a log-ratio;
its scale is the calling method's. Losses and gradients are finite for log-ratios up to +-1e4.
Members that need more than log-ratios are in `mmalign.objectives.pair_losses`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from mmalign.config import PreferenceConfig
from mmalign.objectives import pair_losses
from mmalign.types import InputError, LogRatios

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
Metrics = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What some losses need of two texts besides their log-ratios; (B,) per side.

    Attributes:
        policy_logps: the policy's log-probs, summed over tokens, for `aot`, `sft` and `simpo`.
        lengths: tokens of each side, for `sft`, `simpo`, `sigmoid_norm` and `length_normalize`.
    """

    policy_logps: LogRatios | None = None
    lengths: LogRatios | None = None


def preference_loss(
    logratios: LogRatios,
    *,
    beta: float,
    config: PreferenceConfig,
    score_margins: Tensor | None = None,
    answers: Answers | None = None,
) -> tuple[Tensor, Metrics]:
    """Apply the configured loss to each pair.

    Args:
        logratios: log-ratios of chosen and rejected, (B,) each; half precision is widened to
        float32.
        beta: strength of the pull to the reference, in units of one over a log-ratio.
        config: `loss_type` and the constants of its family member.
        score_margins: score of chosen minus score of rejected (B,), for `offset`.
        answers: log-probs and lengths, for losses that only texts have.

    Returns:
        Losses (B,), and metrics as detached scalars: means over the batch of the implicit rewards
        beta * r (`rewards/chosen`, `rewards/rejected`, `rewards/margin`), of the margin before beta
        (`margin`), and `rewards/accuracy`, the share of pairs with a positive margin in which a
        margin of exactly 0 (policy equal to reference) counts one half.

    Raises:
        InputError: If the config is out of range, `offset` lacks a score margin of some pair, or a
            loss lacks the log-probs or lengths it needs.
    """
    ratios = LogRatios(*(_at_least_float32(side) for side in logratios))
    answers = answers or Answers()
    used = ratios
    if config.length_normalize or config.loss_type == "sigmoid_norm":
        used = _per_token(ratios, answers, config)
    match config.loss_type:
        case "offset":
            offsets = _offsets(score_margins, used.chosen, config.offset_scale)
            loss = offset_loss(used.chosen - used.rejected, beta, offsets)
        case "aot" | "sft" | "simpo":
            loss = _text_loss(used, beta, config, answers)
        case _:
            loss = _pair_loss(used, beta, config)
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
    return -pair_losses.bounded_expm1(-logratio)


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
    return -pair_losses.bounded_expm1(-alpha * logratio) / alpha


def _margin_loss(margin: Tensor, beta: float, config: PreferenceConfig) -> Tensor | None:
    """Compute the losses of the margin alone."""
    smoothing = config.label_smoothing
    match config.loss_type:
        case "sigmoid" | "sigmoid_norm":
            return sigmoid_loss(margin, beta)
        case "ipo":
            return ipo_loss(margin, beta)
        case "hinge":
            return hinge_loss(margin, beta)
        case "robust":
            return robust_loss(margin, beta, smoothing)
        case "cdpo":
            return pair_losses.cdpo_loss(margin, beta, smoothing)
        case "exo_pair":
            return pair_losses.exo_pair_loss(margin, beta, smoothing)
        case "discopop":
            return pair_losses.discopop_loss(margin, beta, config.discopop_tau)
    return None


def _pair_loss(ratios: LogRatios, beta: float, config: PreferenceConfig) -> Tensor:
    """Compute the losses of both log-ratios."""
    loss = _margin_loss(ratios.chosen - ratios.rejected, beta, config)
    if loss is not None:
        return loss
    match config.loss_type:
        case "reverse_kl" | "forward_kl" | "js" | "alpha":
            return divergence_loss(ratios, beta, config.loss_type, config.alpha)
        case "nca_pair":
            return pair_losses.nca_pair_loss(ratios, beta)
        case "bco_pair":
            return pair_losses.bco_pair_loss(ratios, beta)
        case "sppo_hard":
            return pair_losses.sppo_hard_loss(ratios, beta)
        case "aot_unpaired":
            return pair_losses.aot_unpaired_loss(ratios, beta, config.label_smoothing)
        case "apo_zero":
            return pair_losses.apo_zero_loss(ratios, beta)
        case "apo_down":
            return pair_losses.apo_down_loss(ratios, beta)
        case unknown:
            raise InputError(f"unknown loss_type {unknown!r}")


def _text_loss(
    ratios: LogRatios, beta: float, config: PreferenceConfig, answers: Answers
) -> Tensor:
    """Compute the losses that need the policy's log-probs themselves."""
    policy = answers.policy_logps
    if policy is None:
        raise InputError(
            f"loss_type {config.loss_type} needs the log-probs of two answers, which this method"
            " does not compare; use another loss_type"
        )
    policy = LogRatios(*(_at_least_float32(side) for side in policy))
    if config.loss_type == "aot":
        scaled = _per_token(policy, answers, config) if config.length_normalize else policy
        margin = scaled.chosen - scaled.rejected
        ref_margin = (margin - (ratios.chosen - ratios.rejected)).detach()
        return pair_losses.aot_loss(margin, ref_margin, beta, config.label_smoothing)
    averages = _per_token(policy, answers, config)
    if config.loss_type == "sft":
        return -averages.chosen
    return pair_losses.simpo_loss(averages, beta, config.target_margin)


def _per_token(sides: LogRatios, answers: Answers, config: PreferenceConfig) -> LogRatios:
    if answers.lengths is None:
        option = "length_normalize" if config.length_normalize else f"loss_type {config.loss_type}"
        raise InputError(
            f"{option} needs the lengths of two answers, which this method does not compare; use"
            " another loss_type"
        )
    pairs = zip(sides, answers.lengths, strict=True)
    return LogRatios(*(side / length.to(side).clamp(min=1) for side, length in pairs))


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


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
