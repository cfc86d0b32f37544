"""Spectral regularizers of TARS (Zhang et al. 2025, arXiv 2507.21584): the paper's and the code's.

Both look at the discrete Fourier transform over the tokens of a sequence's states z (L, D), so that
what counts is the pattern of the whole and not token-by-token correspondence. They run in float32
at least, and padding takes no part.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

EPSILON = 1e-12
"""Added to spectral energies before their logarithm."""


class Hidden(NamedTuple):
    """States of B sequences: `states` (B, L, D), and `mask` (B, L) bool, false on padding."""

    states: Tensor
    mask: Tensor


def log_energy(hidden: Hidden) -> Tensor:
    """Compute log F, the log spectral energy of each sequence, (B,).

    The paper's equation 10 is F(z) = |Re sum_l z_l exp(-2 pi i k l / L)|^2 and leaves open how
    frequencies k and channels are reduced and which layer z is of. Here F is the mean over all L
    frequencies and all channels, and z is meant to be the last hidden states of the whole sequence.

    By Parseval's theorem that is about half the sum of squares of z, which a network's last
    normalization layer holds nearly constant: then the loss stays at ln 2 (docs/results.md).
    """
    energies = []
    for sequence in _sequences(hidden):
        spectrum = torch.fft.fft(sequence, dim=0).real
        energies.append(spectrum.square().mean())
    return (torch.stack(energies) + EPSILON).log()


def spectral_ratio(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float
) -> Tensor:
    """Compute the paper's L_freq (equation 11) of each sample, (B,).

    -log sigmoid(beta [log F/F_ref]_chosen - beta [log F/F_ref]_rejected) over log energies (B,) of
    the policy on perturbed and of the reference on clean text. The reference's are constants.
    `beta` is the paper's 1.
    """
    margin = (chosen - ref_chosen.detach()) - (rejected - ref_rejected.detach())
    return -logsigmoid(beta * margin)


def spectral_triplet(
    anchor: Hidden, positive: Hidden, negative: Hidden, *, margin: float = 0.5
) -> Tensor:
    """Compute the code's spectral loss of each sample, (B,).

    max(0, d(anchor, positive) - d(anchor, negative) + margin), with d the mean squared difference
    of the amplitude spectra |FFT| over all frequencies and channels. The authors feed it input
    embeddings: the policy's of the perturbed chosen sequence, the reference's of the clean chosen
    and of the clean rejected one. Amplitudes do not change when tokens are rotated.

    Sequences of different lengths are compared at the frequencies of the longest of the three, the
    shorter ones continued by zeros; the authors' code continues them by the embedding of the
    padding token, and takes sample 0 of the batch only.
    """
    losses = []
    for triple in zip(*(_sequences(h) for h in (anchor, positive, negative)), strict=True):
        size = max(len(sequence) for sequence in triple)
        a, p, n = (torch.fft.fft(sequence, n=size, dim=0).abs() for sequence in triple)
        near, far = ((a - other.detach()).square().mean() for other in (p, n))
        losses.append(relu(near - far + margin))
    return torch.stack(losses)


def _sequences(hidden: Hidden) -> list[Tensor]:
    states = hidden.states.to(torch.promote_types(hidden.states.dtype, torch.float32))
    return [row[mask] for row, mask in zip(states, hidden.mask.bool(), strict=True)]
