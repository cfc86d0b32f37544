"""The preference losses that need more than the margin: both sides, the batch, lengths, constants.

Notation and units are those of `mmalign.objectives.preference`, which picks them by name: r is a
side's log-ratio (B,), h = r_chosen - r_rejected the margin, s = sigmoid. Losses are (B,) and
nothing is reduced; values and gradients are finite for log-ratios up to +-1e4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from mmalign.types import InputError, LogRatios

EXPONENT_LIMIT = 30.0
"""Beyond this exponent exp is continued by its tangent: finite, convex, with a useful gradient."""


def cdpo_loss(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Compute (1 - e) l(h) + e l(-h) with l(h) = -log s(beta h): conservative DPO.

    Mitchell 2023, "A note on DPO with noisy preferences". e is `label_smoothing`, the assumed share
    of flipped labels. The minimum lies at the finite margin where s(beta h) = 1 - e.

    Raises:
        InputError: If `label_smoothing` is not in [0, 0.5).
    """
    if not 0 <= label_smoothing < 0.5:
        raise InputError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    return _smoothed(beta * margin, label_smoothing)


def exo_pair_loss(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Compute KL(q || p), q = (s(beta h), s(-beta h)), p = (1 - e, e): EXO-pref.

    Ji et al. 2024, arXiv 2402.00856, equation 16 for two answers. e is `label_smoothing`.

    Raises:
        InputError: If `label_smoothing` is not in (0, 0.5), where the divergence is infinite.
    """
    if not 0 < label_smoothing < 0.5:
        raise InputError(
            "loss_type exo_pair needs label_smoothing in (0, 0.5), such as 0.001; got"
            f" {label_smoothing}"
        )
    logits = beta * margin
    chosen = logits.sigmoid() * (logsigmoid(logits) - math.log1p(-label_smoothing))
    rejected = (-logits).sigmoid() * (logsigmoid(-logits) - math.log(label_smoothing))
    return chosen + rejected


def nca_pair_loss(logratios: LogRatios, beta: float) -> Tensor:
    """Compute -log s(beta r_c) - log s(-beta r_c) / 2 - log s(-beta r_r) / 2: NCA for pairs.

    Chen et al. 2024, arXiv 2402.05369. Each side is compared with the reference, so that the chosen
    answer does not become less likely.
    """
    chosen, rejected = (beta * side for side in logratios)
    return -logsigmoid(chosen) - 0.5 * (logsigmoid(-chosen) + logsigmoid(-rejected))


def bco_pair_loss(logratios: LogRatios, beta: float) -> Tensor:
    """Compute -log s(beta r_chosen) - log s(-beta r_rejected): BCO on pairs.

    Jung et al. 2024, arXiv 2404.04656, without the paper's reward shift (a running mean of
    rewards), as in TRL.
    """
    return -logsigmoid(beta * logratios.chosen) - logsigmoid(-beta * logratios.rejected)


def sppo_hard_loss(logratios: LogRatios, beta: float) -> Tensor:
    """Compute (r_chosen - 1 / (2 beta))^2 + (r_rejected + 1 / (2 beta))^2: SPPO, hard labels.

    Wu et al. 2024, arXiv 2405.00675, algorithm 1 with win probabilities 1 and 0. The loss has the
    unit of a squared log-ratio.
    """
    target = 0.5 / beta
    return (logratios.chosen - target).square() + (logratios.rejected + target).square()


def aot_loss(
    policy_margin: Tensor, ref_margin: Tensor, beta: float, label_smoothing: float
) -> Tensor:
    """Compute the cDPO loss between sorted margins of the policy and of the reference: paired AOT.

    Melnyk et al. 2024, arXiv 2406.05882. `policy_margin` and `ref_margin` (B,) are log-probs of
    chosen minus those of rejected. Sorting makes it a loss on the distributions of a batch: the
    i-th value belongs to the i-th smallest margins, not to sample i, and more than one pair per
    forward is needed for it to differ from `cdpo`.

    Raises:
        InputError: If `label_smoothing` is not in [0, 0.5).
    """
    gap = policy_margin.sort(0).values - ref_margin.sort(0).values
    return cdpo_loss(gap, beta, label_smoothing)


def aot_unpaired_loss(logratios: LogRatios, beta: float, label_smoothing: float) -> Tensor:
    """Compute the cDPO loss between sorted log-ratios of chosen and of rejected: unpaired AOT.

    Melnyk et al. 2024, arXiv 2406.05882. As `aot_loss`, a loss on the distributions of a batch.

    Raises:
        InputError: If `label_smoothing` is not in [0, 0.5).
    """
    gap = logratios.chosen.sort(0).values - logratios.rejected.sort(0).values
    return cdpo_loss(gap, beta, label_smoothing)


def apo_zero_loss(logratios: LogRatios, beta: float) -> Tensor:
    """Compute 1 - s(beta r_chosen) + s(beta r_rejected): APO-zero.

    D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7: for chosen answers better than the
    model's own, chosen ones become likelier and rejected ones less likely.
    """
    return (-beta * logratios.chosen).sigmoid() + (beta * logratios.rejected).sigmoid()


def apo_down_loss(logratios: LogRatios, beta: float) -> Tensor:
    """Compute s(beta r_chosen) + 1 - s(beta h): APO-down.

    D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 8: for chosen answers worse than the
    model's own, both become less likely, rejected ones more so.
    """
    margin = logratios.chosen - logratios.rejected
    return (beta * logratios.chosen).sigmoid() + (-beta * margin).sigmoid()


def discopop_loss(margin: Tensor, beta: float, tau: float) -> Tensor:
    """Compute (1 - m) (-log s(beta h)) + m exp(-beta h), m = s(beta h / tau): DiscoPOP.

    Lu et al. 2024, arXiv 2406.08414, equation 5, the log-ratio modulated loss found by a language
    model; `tau` is its 0.05. It is not monotone: near beta h = 0 it rises a little.

    Raises:
        InputError: If `tau` is not positive.
    """
    if tau <= 0:
        raise InputError(f"discopop_tau must be positive, got {tau}")
    logits = beta * margin
    mixture = (logits / tau).sigmoid()
    return (1 - mixture) * -logsigmoid(logits) + mixture * (1 + bounded_expm1(-logits))


def simpo_loss(average_logps: LogRatios, beta: float, target_margin: float) -> Tensor:
    """Compute -log s(beta (a_chosen - a_rejected) - gamma): SimPO.

    Meng et al. 2024, arXiv 2405.14734, equation 6. There is no reference: a is the policy's own
    log-prob per token, (B,). `target_margin` is gamma in nats; the paper takes beta 2 to 10 and
    gamma 0.3 to 1.6.
    """
    return -logsigmoid(beta * (average_logps.chosen - average_logps.rejected) - target_margin)


def bounded_expm1(exponent: Tensor) -> Tensor:
    """Compute exp(x) - 1, continued by its tangent above `EXPONENT_LIMIT`.

    expm1 rather than exp: differences of log-ratios near 0 keep all their digits.
    """
    limit = torch.as_tensor(EXPONENT_LIMIT, dtype=exponent.dtype, device=exponent.device)
    return torch.expm1(exponent.clamp(max=EXPONENT_LIMIT)) + limit.exp() * relu(exponent - limit)


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    kept = (1 - label_smoothing) * -logsigmoid(logits)
    return kept + label_smoothing * -logsigmoid(-logits)
