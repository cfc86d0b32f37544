"""Checked calls of rewards: every bad score is an error that names its sample.

A reward that runs out of memory is asked for half as many samples at a time. One that scores a
sample against the others of its prompt (`scores_sets`) is given whole prompts, whatever that takes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast, overload

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mmalign.endpoint import EndpointError
from mmalign.processes import gather_shared, is_main, share, together
from mmalign.types import InputError

if TYPE_CHECKING:
    from mmalign.types import Response, Reward, TextReward

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


def scores_sets(reward: object) -> bool:
    """Tell whether a reward scores a sample against the others of its prompt in the call.

    That is the optional attribute `scores_sets` of a reward. Such a reward is given all samples of
    a prompt at once: half of them would get other scores.
    """
    return bool(getattr(reward, "scores_sets", False))


def divide(
    prompts: Sequence[str],
    size: int | None,
    *,
    whole: bool,
    rows: Sequence[int] | None = None,
) -> list[list[int]]:
    """Divide samples into batches.

    Args:
        prompts: one per sample.
        size: samples per batch; None for all.
        whole: cut between prompts only. The samples of a prompt come together, in the order of the
            prompts' first ones, and a prompt of more than `size` is a batch by itself.
        rows: the samples to divide, by number; all when omitted.

    Returns:
        The numbers of each batch's samples.
    """
    left = list(range(len(prompts))) if rows is None else list(rows)
    most = size or max(len(left), 1)
    if not whole:
        return [left[start : start + most] for start in range(0, len(left), most)]
    groups: dict[str, list[int]] = {}
    for row in left:
        groups.setdefault(prompts[row], []).append(row)
    batches: list[list[int]] = []
    for group in groups.values():
        if batches and len(batches[-1]) + len(group) <= most:
            batches[-1] += group
        else:
            batches.append(list(group))
    return batches


def score_samples(
    reward: Reward | TextReward,
    samples: Tensor | Sequence[Response],
    prompts: Sequence[str],
    names: Sequence[str] | None = None,
) -> Tensor:
    """Score samples in one call and check every score; gradients pass through.

    Args:
        reward: what scores.
        samples: images (B, 3, H, W) in [0, 1], or answers, as the reward's modality is.
        prompts: one per sample.
        names: one per sample, for messages; their numbers when omitted.

    Returns:
        Finite scores (B,), on the device the reward chose.

    Raises:
        InputError: naming the reward and the sample, if counts differ or if the reward raises or
            returns NaN, infinity, None or a wrong number of scores.
        MemoryError: or the error that torch raises, when memory runs out; `BatchedReward` goes on.
    """
    labels = _labels(samples, names)
    if not len(samples) == len(prompts) == len(labels):
        raise InputError(
            f"reward {reward.name}: {len(samples)} samples, {len(prompts)} prompts and "
            f"{len(labels)} names: there must be one prompt and one name per sample"
        )
    if not labels:
        return torch.zeros(0)
    ask = cast("Callable[..., object]", reward)
    try:
        return to_scores(ask(samples, prompts), len(samples))
    except (ScorerError, EndpointError):
        raise
    except BadScoreError as error:
        where = _span(labels) if error.index is None else labels[error.index]
        raise InputError(f"reward {reward.name} {error.problem} for {where}") from error
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # One by one, a sample that is compared with none fails or waits for another reason.
        alone = not scores_sets(reward)
        where = _first_failing(ask, samples, prompts, labels) if alone else _span(labels)
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        reason = f"{kind}{error}".splitlines()[0]
        raise InputError(f"reward {reward.name} failed for {where}: {reason}") from error


class BatchedReward:
    """A reward asked for at most `batch_size` samples at a time, or for fewer where memory ends.

    One that `scores_sets` gets whole prompts, however many samples they have.

    Attributes:
        reward: what scores.
        batch_size: samples at a time; None for all of a call at once. Halved, with a warning,
            whenever the reward runs out of memory, and kept for what follows.
    """

    def __init__(self, reward: Reward | TextReward, batch_size: int | None = None) -> None:
        """Wrap a reward."""
        self.reward, self.batch_size = reward, batch_size
        self.scores_sets = scores_sets(reward)

    def __call__(
        self,
        samples: Tensor | Sequence[Response],
        prompts: Sequence[str],
        names: Sequence[str] | None = None,
    ) -> Tensor:
        """Score samples; returns (B,). Gradients pass through; what they need is not halved.

        Raises:
            InputError: as `score_samples`, or if memory ends at a single sample, or at a single
                prompt of a reward that scores sets.
        """
        labels = _labels(samples, names)
        if not len(samples) == len(prompts) == len(labels):
            return score_samples(self.reward, samples, prompts, labels)  # says what is wrong
        parts: list[Tensor] = []
        order: list[int] = []
        waiting = divide(prompts, self.batch_size, whole=self.scores_sets)
        while waiting:
            rows = waiting[0]
            asked, called = [prompts[row] for row in rows], [labels[row] for row in rows]
            part = self._attempt(take(samples, rows), asked, called)
            if part is None:
                _free_memory()  # here, where the exception no longer holds what it had reached
                self._halve(asked, called)
                left = [row for batch in waiting for row in batch]
                waiting = divide(prompts, self.batch_size, whole=self.scores_sets, rows=left)
                continue
            parts.append(part)
            order += waiting.pop(0)
        return in_order(torch.cat(parts), order) if parts else torch.zeros(0)

    def _attempt(
        self, samples: Tensor | Sequence[Response], prompts: Sequence[str], labels: list[str]
    ) -> Tensor | None:
        try:
            return score_samples(self.reward, samples, prompts, labels)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _halve(self, prompts: Sequence[str], labels: Sequence[str]) -> None:
        name, count = self.reward.name, len(labels)
        if count == 1:
            raise InputError(
                f"reward {name} runs out of memory on {labels[0]} alone: use a smaller image, a "
                "lower precision, or a reward served from another machine "
                "(docs/external_rewards.md)"
            )
        if self.scores_sets and len(set(prompts)) == 1:
            raise InputError(
                f"reward {name} runs out of memory on the {count} samples of {prompts[0][:60]!r}, "
                "which it compares with each other, so that they cannot be divided: use fewer or "
                "smaller images, or a lower precision"
            )
        self.batch_size = count // 2
        logger.warning(
            "reward %s: out of memory with %d samples at a time; going on with %d",
            *(name, count, self.batch_size),
        )


def score_in_batches(
    reward: Reward | TextReward,
    samples: Tensor | Sequence[Response],
    prompts: Sequence[str],
    *,
    names: Sequence[str] | None = None,
    batch_size: int = 32,
) -> Tensor:
    """Score many samples without gradients, `batch_size` at a time, with a bar.

    Where memory runs out, the batch is halved and a warning says so.
    Several processes, all of which have to call it with the same samples, share the batches.

    Returns:
        Scores (B,), float64 on CPU.

    Raises:
        InputError: as `BatchedReward`.
    """
    labels = _labels(samples, names)
    if not len(samples) == len(prompts) == len(labels):
        raise InputError(f"{len(samples)} samples but {len(prompts)} prompts, {len(labels)} names")
    batched = BatchedReward(reward, batch_size)
    batches = divide(prompts, batch_size, whole=batched.scores_sets)
    bar = tqdm(share(batches), f"score {reward.name}", unit="batch", disable=not is_main())

    def score() -> list[Tensor]:
        parts = []
        for rows in bar:
            asked, called = [prompts[row] for row in rows], [labels[row] for row in rows]
            scores = batched(take(samples, rows), asked, called)
            parts.append(scores.to("cpu", torch.float64))
        return parts

    with torch.no_grad(), bar:
        parts = gather_shared(together(score))
    joined = torch.cat([torch.zeros(0, dtype=torch.float64), *parts])
    return in_order(joined, [row for rows in batches for row in rows])


@overload
def take(samples: Tensor, rows: Sequence[int]) -> Tensor: ...
@overload
def take(
    samples: Tensor | Sequence[Response], rows: Sequence[int]
) -> Tensor | Sequence[Response]: ...
def take(samples: Tensor | Sequence[Response], rows: Sequence[int]) -> Tensor | Sequence[Response]:
    """Take samples by their numbers; neighbors are not copied."""
    first, end = rows[0], rows[-1] + 1
    if list(rows) == list(range(first, end)):
        return samples[first:end]
    return samples[list(rows)] if isinstance(samples, Tensor) else [samples[row] for row in rows]


def in_order(scores: Tensor, order: list[int]) -> Tensor:
    """Put scores of the samples with the numbers `order` into the order of the samples."""
    if order == sorted(order):
        return scores
    return scores[torch.tensor(order, device=scores.device).argsort()]


def _labels(samples: Tensor | Sequence[Response], names: Sequence[str] | None) -> list[str]:
    return list(names) if names is not None else [f"sample {i}" for i in range(len(samples))]


def is_out_of_memory(error: BaseException) -> bool:
    """Tell the errors of all allocators, some of which have no class of their own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    from accelerate.utils.memory import should_reduce_batch_size

    return bool(should_reduce_batch_size(error))


def _free_memory() -> None:
    """Give back what the failed attempt held."""
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)


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
    reward: Callable[..., object],
    samples: Tensor | Sequence[Response],
    prompts: Sequence[str],
    labels: list[str],
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
