"""Checked calls of rewards: every bad score is an error that names its sample."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mmalign.types import InputError

if TYPE_CHECKING:
    from mmalign.types import Reward

logger = logging.getLogger(__name__)


class BadScoreError(InputError):
    """A reward's answer for one sample, or for the whole batch (`index` None), is unusable."""

    def __init__(self, problem: str, index: int | None) -> None:
        """Describe the problem; `index` counts samples of the batch."""
        super().__init__(problem if index is None else f"{problem} for sample {index}")
        self.problem = problem
        self.index = index


class ScorerError(InputError):
    """A reward failed whatever the samples, such as a server that is down; the message is whole."""


def to_scores(values: object, count: int) -> Tensor:
    """Turn what a reward returned into a tensor of `count` finite scores.

    Args:
        values: tensor, array or sequence of numbers, of shape (B,) or (B, 1). A tensor keeps its
            graph.
        count: B.

    Returns:
        Scores (B,).

    Raises:
        BadScoreError: for a wrong length, None, text, NaN or infinity.
    """
    scores = values if isinstance(values, Tensor) else _from_sequence(values, count)
    if scores.ndim == 2 and scores.shape[1] == 1:
        scores = scores[:, 0]
    if scores.shape != (count,):
        shape = "x".join(map(str, scores.shape)) or "a single number"
        raise BadScoreError(f"returned {shape} instead of {count} scores", None)
    finite = torch.isfinite(scores.detach())
    if not bool(finite.all()):
        index = int((~finite).nonzero()[0])
        raise BadScoreError(f"returned {float(scores[index].detach())}", index)
    return scores


def score_samples(
    reward: Reward, samples: Tensor, prompts: Sequence[str], names: Sequence[str] | None = None
) -> Tensor:
    """Score samples and check every score; gradients pass through.

    Args:
        reward: what scores.
        samples: images (B, 3, H, W) in [0, 1].
        prompts: one per sample.
        names: one per sample, for messages; their numbers when omitted.

    Returns:
        Finite scores (B,), on the device the reward chose.

    A batch for which the reward has no memory is scored in halves.

    Raises:
        InputError: naming the reward and the sample, if counts differ or if the reward raises, has
            no memory for a single sample, or returns NaN, infinity, None or a wrong number of
            scores.
    """
    labels = list(names) if names is not None else [f"sample {i}" for i in range(len(samples))]
    if not len(samples) == len(prompts) == len(labels):
        raise InputError(
            f"reward {reward.name}: {len(samples)} samples, {len(prompts)} prompts and "
            f"{len(labels)} names: there must be one prompt and one name per sample"
        )
    if not labels:
        return torch.zeros(0)
    try:
        return to_scores(reward(samples, prompts), len(samples))
    except ScorerError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        if len(samples) == 1:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise InputError(
                f"reward {reward.name} has no memory for {labels[0]}: {reason}"
            ) from error
    except BadScoreError as error:
        where = _span(labels) if error.index is None else labels[error.index]
        raise InputError(f"reward {reward.name} {error.problem} for {where}") from error
    except Exception as error:
        where = _first_failing(reward, samples, prompts, labels)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"reward {reward.name} failed for {where}: {reason}") from error
    return _in_halves(reward, samples, prompts, labels)  # outside: the error holds the tensors


def score_in_batches(
    reward: Reward,
    samples: Tensor,
    prompts: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    batch_size: int = 32,
) -> Tensor:
    """Score many samples without gradients, `batch_size` at a time, with a bar.

    Returns:
        Scores (B,), float64 on CPU.

    Raises:
        InputError: as `score_samples`.
    """
    labels = list(names) if names is not None else [f"sample {i}" for i in range(len(samples))]
    if not len(samples) == len(prompts) == len(labels):
        raise InputError(f"{len(samples)} samples but {len(prompts)} prompts, {len(labels)} names")
    parts = [torch.zeros(0, dtype=torch.float64)]
    with torch.no_grad(), tqdm(total=len(samples), desc=f"score {reward.name}") as bar:
        for start in range(0, len(samples), batch_size):
            rows = slice(start, start + batch_size)
            scores = score_samples(reward, samples[rows], prompts[rows], labels[rows])
            parts.append(scores.to("cpu", torch.float64))
            bar.update(len(scores))
    return torch.cat(parts)


def _in_halves(
    reward: Reward, samples: Tensor, prompts: Sequence[str], labels: Sequence[str]
) -> Tensor:
    """Score what was too much for the memory in two calls."""
    logger.warning("reward %s: no memory for %d samples at once", reward.name, len(samples))
    middle = len(samples) // 2
    halves = (slice(None, middle), slice(middle, None))
    return torch.cat(
        [score_samples(reward, samples[rows], prompts[rows], labels[rows]) for rows in halves]
    )


def _from_sequence(values: object, count: int) -> Tensor:
    if values is None:
        raise BadScoreError("returned None", None)
    try:
        items = list(cast("Sequence[object]", values))
    except TypeError:
        raise BadScoreError(f"returned a {type(values).__name__}", None) from None
    if len(items) != count:
        raise BadScoreError(f"returned {len(items)} instead of {count} scores", None)
    for index, item in enumerate(items):
        try:
            number = float(item.detach() if isinstance(item, Tensor) else cast("float", item))
        except (TypeError, ValueError, RuntimeError):
            raise BadScoreError(f"returned {item!r}", index) from None
        if not math.isfinite(number):
            raise BadScoreError(f"returned {number}", index)
    if all(isinstance(item, Tensor) for item in items):
        return torch.stack([cast("Tensor", item).reshape(()) for item in items])
    return torch.tensor([float(cast("float", item)) for item in items])


def _first_failing(
    reward: Reward, samples: Tensor, prompts: Sequence[str], labels: list[str]
) -> str:
    """Score one by one: a batch that failed does not say which sample it was."""
    for index, label in enumerate(labels):
        try:
            reward(samples[index : index + 1], [prompts[index]])
        except Exception:
            return label
    return _span(labels)


def _span(labels: list[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{labels[0]} to {labels[-1]}"
