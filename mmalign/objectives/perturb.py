"""Perturbed texts for TARS (Zhang et al. 2025, arXiv 2507.21584): which tokens, and what instead.

The tokens that say least about the image are masked or replaced, so that the policy cannot lean on
them. What may be touched is given as a mask and nothing else ever is: no image placeholder, no
token of the chat template, no padding. One sample at a time, L tokens, with draws from a generator
keyed by (sample, epoch), so that the reference's log-probs of perturbed rows can be known ahead.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from mmalign.objectives.vlm_rows import PerturbSettings
from mmalign.randomness import keyed_generator
from mmalign.sequence import IGNORE
from mmalign.types import InputError


class Perturbed(NamedTuple):
    """A perturbed text: token ids (L,), and which of them were changed (L,) bool."""

    ids: Tensor
    changed: Tensor


def perturb_generator(
    seed: int, sample_id: str, epoch: int, part: str = "prompt"
) -> torch.Generator:
    """Make the generator of one sample in one epoch.

    `part` tells prompt, chosen and rejected apart, so that both answers of a pair share the
    perturbed prompt whatever else is perturbed.
    """
    return keyed_generator("perturb", seed, sample_id, epoch, part)


def perturbable_tokens(ids: Tensor, text: Tensor, protected_ids: Collection[int]) -> Tensor:
    """Mark the tokens that may be perturbed, (L,) bool.

    Args:
        ids: token ids (L,).
        text: (L,) bool, true on what a user or a model wrote, false on the chat template.
        protected_ids: ids of image and video placeholders, BOS, EOS, padding and other special
            tokens, which stay wherever they stand.
    """
    protected = torch.tensor(sorted(protected_ids), dtype=ids.dtype, device=ids.device)
    return text.bool() & ~torch.isin(ids, protected)


def token_similarity(image: Tensor, tokens: Tensor, *, softmax: bool = False) -> Tensor:
    """Compute the cosine between an image's and each token's CLIP embedding, (L,).

    Args:
        image: (E,).
        tokens: (L, E), each token encoded as a text of its own.
        softmax: return softmax(100 cos) over tokens, as the authors' code; all but one or two
            tokens are then near 0, and `share` perturbs almost at random.
    """
    unit = (torch.nn.functional.normalize(t.float(), dim=-1) for t in (image, tokens))
    target, each = unit
    cosine = each @ target
    return (100 * cosine).softmax(0) if softmax else cosine


def perturb_tokens(
    ids: Tensor,
    perturbable: Tensor,
    similarity: Tensor,
    *,
    settings: PerturbSettings,
    mask_id: int,
    replacement_ids: Tensor,
    generator: torch.Generator,
    where: str = "the sample",
) -> Perturbed:
    """Mask or replace the visual-agnostic tokens of one text.

    Args:
        ids: token ids (L,).
        perturbable: what may be touched (L,) bool; see `perturbable_tokens`.
        similarity: similarity of each token to the image (L,); ignored elsewhere.
        settings: which tokens, and what is done to them; `scope` is the caller's business.
        mask_id: what stands for a masked token; not the padding id where attention masks are
            derived from ids.
        replacement_ids: ids to draw replacements from (K,), at least two.
        generator: see `perturb_generator`.
        where: names the sample in errors.

    Raises:
        InputError: If all perturbable tokens would go, or similarities are not finite.
    """
    places = perturbable.nonzero()[:, 0]
    values = similarity[places].double().cpu()
    if len(places) < 2:
        raise InputError(
            f"{where}: {len(places)} tokens may be perturbed, and perturbing one would leave none"
            " of them; drop the row or use a preset without perturbation"
        )
    if not bool(values.isfinite().all()):
        raise InputError(f"{where}: similarities between tokens and image are not finite")
    if settings.rule == "visual_gap":
        picked = least_similar(values, settings.omega, settings.max_share)
    else:
        picked = draw_by_similarity(values, settings.share, generator, where=where)
    changed = torch.zeros_like(perturbable, dtype=torch.bool)
    changed[places[picked.to(places.device)]] = True
    new = ids.clone()
    if settings.mode == "mask":
        new[changed] = mask_id
    else:
        new[changed] = _replacements(ids[changed], replacement_ids, generator)
    return Perturbed(new, changed)


def least_similar(similarity: Tensor, omega: float, max_share: float) -> Tensor:
    """Choose the paper's tokens: positions of the N least similar of n, sorted by similarity.

    N = floor(omega / gap) + 1. With relevance P = -similarity, the gap is top1(P) - top2(P), that
    of the two least similar tokens: a clear least similar token goes alone, a crowd goes together.
    Equal tokens make the gap 0 and N infinite; N is held to `max_share` of the tokens, at least 1.
    """
    order = similarity.argsort(stable=True)
    gap = (similarity[order[1]] - similarity[order[0]]).item()
    limit = _at_most(len(similarity), max_share)
    wanted = math.inf if gap <= 0 else omega / gap
    return order[: limit if wanted >= limit else min(limit, math.floor(wanted) + 1)]


def draw_by_similarity(
    similarity: Tensor, share: float, generator: torch.Generator, *, where: str = "the sample"
) -> Tensor:
    """Draw max(1, floor(share n)) of n positions without replacement, as the authors' code.

    Probabilities are proportional to 1 - similarity; a similarity of 1 protects a token. The code
    draws over a whole batch, placeholders included; here each text draws from its own tokens.

    Raises:
        InputError: If every token is protected.
    """
    weights = (1 - similarity).clamp(min=0)
    possible = int((weights > 0).sum())
    if not possible:
        raise InputError(f"{where}: every token has similarity 1, so that none can be perturbed")
    count = min(_at_most(len(similarity), share), possible)
    return torch.multinomial(weights, count, replacement=False, generator=generator)


def unscored(labels: Tensor, changed: Tensor) -> Tensor:
    """Take perturbed positions out of the labels, (L,): no network is asked to predict them."""
    return labels.masked_fill(changed, IGNORE)


def _at_most(count: int, share: float) -> int:
    """Count a share of tokens: at least one, and never all."""
    return min(max(1, int(count * share)), count - 1)


def _replacements(old: Tensor, candidates: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a candidate other than the old token for each position."""
    if len(candidates) < 2:
        raise ValueError("replacing tokens needs at least two replacement ids")
    draws = torch.randint(len(candidates), old.shape, generator=generator).to(old.device)
    pool = candidates.to(old)
    same = pool[draws] == old
    return pool[torch.where(same, (draws + 1) % len(pool), draws)]
