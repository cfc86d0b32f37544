"""Comparison of two image generators on the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mmalign.intervals import Mean, WinRate, checked_values, mean_ci, win_rate
from mmalign.processes import gather_shared, is_main, share
from mmalign.randomness import derive_seed
from mmalign.scoring import score_in_batches
from mmalign.types import InputError

if TYPE_CHECKING:
    from mmalign.config import RewardConfig, SamplingConfig
    from mmalign.types import ImageAdapter, Reward

Sampler = Callable[[Sequence[str], Sequence[int]], Tensor]
"""Makes one image (3, H, W) per prompt and seed, stacked to (N, 3, H, W) in [0, 1]."""


class Verdict(NamedTuple):
    """What the judge says of one image: its score, a phrase, and whether the image is right.

    `correct` is None for a judge that has no notion of right and wrong.
    """

    score: float
    text: str
    correct: bool | None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything measured; images and verdicts have one row per (prompt, index), prompt first.

    `before` and `after` map a metric to its mean for the base and the policy; `changes` to the mean
    paired difference after - before with its interval. `rewards` names the metrics that are rewards
    rather than the judge or what follows from it.
    """

    prompts: list[str]
    seeds: list[int]
    before: dict[str, float]
    after: dict[str, float]
    changes: dict[str, Mean]
    win_rate: WinRate | None
    judge: str | None
    images_before: Tensor
    images_after: Tensor
    rewards: list[str] = field(default_factory=list)
    verdicts_before: list[Verdict] = field(default_factory=list)
    verdicts_after: list[Verdict] = field(default_factory=list)


def diversity(images: Tensor, groups: Sequence[str]) -> float:
    """Average pairwise distance among images of one prompt, then over prompts.

        d(a, b) = sqrt(mean over pixels and channels of (a - b)^2)

    Args:
        images: (N, 3, H, W) in [0, 1].
        groups: prompt of each image; prompts with a single image do not count.

    Raises:
        InputError: if no prompt has two images.
    """
    distances = prompt_diversity(images, groups)
    return sum(distances.values()) / len(distances)


def prompt_diversity(images: Tensor, groups: Sequence[str]) -> dict[str, float]:
    """Average pairwise distance of every prompt with at least two images; see `diversity`.

    Raises:
        InputError: if no prompt has two images.
    """
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    distances = {}
    for group, rows in members.items():
        if len(rows) > 1:
            flat = images[rows].flatten(1).double()
            pixels = flat.shape[1]
            distances[group] = float(torch.pdist(flat).mean()) / pixels**0.5
    if not distances:
        raise InputError("diversity needs at least two images of one prompt")
    return distances


def plan(prompts: Sequence[str], images_per_prompt: int, seed: int) -> tuple[list[str], list[int]]:
    """List every (prompt, seed) to sample, prompt by prompt.

    A prompt that occurs twice gets twice as many different seeds.

    Returns:
        Prompts and seeds, both of length `len(prompts) * images_per_prompt`.
    """
    used: dict[str, int] = {}
    rows: list[tuple[str, int]] = []
    for prompt in prompts:
        first = used.get(prompt, 0)
        used[prompt] = first + images_per_prompt
        rows += [
            (prompt, derive_seed(seed, "evaluation", prompt, index))
            for index in range(first, first + images_per_prompt)
        ]
    return [prompt for prompt, _ in rows], [row_seed for _, row_seed in rows]


def sample_images(
    adapter: ImageAdapter,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: SamplingConfig,
    description: str = "sample",
) -> Tensor:
    """Sample one image per prompt and seed in batches, with a bar; (N, 3, H, W) float32 on CPU.

    Several processes, all of which have to call it, share the batches, and each gets all images.
    """
    starts = share(range(0, len(prompts), sampling.batch_size))
    batches = [slice(start, start + sampling.batch_size) for start in starts]
    total = sum(len(prompts[rows]) for rows in batches)
    parts = []
    with tqdm(total=total, desc=description, unit="image", disable=not is_main()) as bar:
        for rows in batches:
            images = adapter.sample(prompts[rows], seeds[rows], sampling)
            parts.append(images.float().cpu())
            bar.update(len(images))
    return torch.cat(gather_shared(parts))


def evaluate_models(
    base: Sampler | Tensor,
    policy: Sampler | Tensor,
    prompts: Sequence[str],
    *,
    rewards: Sequence[tuple[Reward, RewardConfig]] = (),
    judge: Reward | None = None,
    images_per_prompt: int = 4,
    seed: int = 0,
) -> Evaluation:
    """Measure base and policy on the same prompts and seeds.

    A judge may have two optional methods: `metrics(images, prompts) -> dict[str, (B,)]`, averaged
    into `before` and `after`, of which `correct` marks each picture; and
    `verdicts(images, prompts) -> list[str]`, shown under it.

    Args:
        base: sampler of the base, or its images in the order of `plan`.
        policy: sampler of the trained model, or its images.
        prompts: evaluation prompts.
        rewards: rewards to report, each with its configuration (batch size).
        judge: the reward that decides each pair.
        images_per_prompt: images per prompt and model.
        seed: base seed of the images and of the bootstrap.

    Raises:
        InputError: if there are no prompts, images are missing, or a score is bad.
    """
    if not prompts or images_per_prompt < 1:
        raise InputError("evaluation needs at least one prompt and one image per prompt")
    rows, seeds = plan(prompts, images_per_prompt, seed)
    images = [_images(base, rows, seeds, "base"), _images(policy, rows, seeds, "policy")]
    names = [f"image {index} of prompt {prompt!r}" for index, prompt in enumerate(rows)]
    tables = [_reward_table(side, rows, names, rewards) for side in images]
    verdicts: list[list[Verdict]] = [[], []]
    rate = None
    if judge is not None:
        verdicts = [_judge(judge, *pair, rows, names) for pair in zip(images, tables, strict=True)]
        before_scores, after_scores = ([v.score for v in side] for side in verdicts)
        rate = win_rate(after_scores, before_scores, rows, seed=seed)
    changes = {k: mean_ci(tables[1][k] - tables[0][k], rows, seed=seed) for k in tables[0]}
    before, after = ({k: float(v.mean()) for k, v in table.items()} for table in tables)
    if len(set(rows)) < len(rows):
        spread = [prompt_diversity(side, rows) for side in images]
        change = [spread[1][prompt] - spread[0][prompt] for prompt in spread[0]]
        changes["diversity"] = mean_ci(change, list(spread[0]), seed=seed)
        before["diversity"], after["diversity"] = (sum(s.values()) / len(s) for s in spread)
    return Evaluation(
        prompts=rows,
        seeds=seeds,
        before=before,
        after=after,
        changes=changes,
        win_rate=rate,
        judge=judge.name if judge is not None else None,
        rewards=list(tables[0])[: len(rewards)],
        images_before=images[0],
        images_after=images[1],
        verdicts_before=verdicts[0],
        verdicts_after=verdicts[1],
    )


def measure_images(
    images: Tensor,
    prompts: Sequence[str],
    *,
    rewards: Sequence[tuple[Reward, RewardConfig]] = (),
    judge: Reward | None = None,
) -> dict[str, float]:
    """Measure one model: mean of each reward, then of the judge and its metrics, then diversity.

    The names are those of `evaluate_models`.

    Args:
        images: (N, 3, H, W) in [0, 1].
        prompts: prompt of each image.
        rewards: rewards to report, each with its configuration (batch size).
        judge: the judge, with the optional method `metrics`.

    Raises:
        InputError: if a score is bad.
    """
    rows = list(prompts)
    names = [f"image {index} of prompt {prompt!r}" for index, prompt in enumerate(rows)]
    table = _reward_table(images, rows, names, rewards)
    if judge is not None:
        _judge(judge, images, table, rows, names)
    means = {name: float(values.mean()) for name, values in table.items()}
    return means if len(set(rows)) == len(rows) else {**means, "diversity": diversity(images, rows)}


def _images(source: Sampler | Tensor, prompts: list[str], seeds: list[int], side: str) -> Tensor:
    images = source if isinstance(source, Tensor) else source(prompts, seeds)
    if images.ndim != 4 or len(images) != len(prompts):
        raise InputError(
            f"evaluation: {side} has images of shape {tuple(images.shape)} "
            f"for {len(prompts)} prompts and seeds"
        )
    return images.detach().cpu()


def _reward_table(
    images: Tensor,
    prompts: list[str],
    names: list[str],
    rewards: Sequence[tuple[Reward, RewardConfig]],
) -> dict[str, Tensor]:
    table: dict[str, Tensor] = {}
    for reward, config in rewards:
        scores = score_in_batches(
            reward, images, prompts, names=names, batch_size=config.batch_size
        )
        table[_free_name(reward.name, table)] = scores
    return table


def _judge(
    judge: Any, images: Tensor, table: dict[str, Tensor], prompts: list[str], names: list[str]
) -> list[Verdict]:
    """Add the judge's score and metrics to `table`; return its verdicts."""
    scores = score_in_batches(judge, images, prompts, names=names)
    table[_free_name(judge.name, table)] = scores
    correct: list[bool | None] = [None] * len(prompts)
    if hasattr(judge, "metrics"):
        with torch.no_grad():
            metrics = judge.metrics(images, prompts)
        for name, values in metrics.items():
            table[_free_name(name, table)] = checked_values(values, prompts)
        if "correct" in metrics:
            correct = [
                value > 0.5 for value in checked_values(metrics["correct"], prompts).tolist()
            ]
    texts = judge.verdicts(images, prompts) if hasattr(judge, "verdicts") else [""] * len(prompts)
    return [Verdict(*row) for row in zip(scores.tolist(), texts, correct, strict=True)]


def _free_name(name: str, table: dict[str, Tensor]) -> str:
    candidate, count = name, 1
    while candidate in table:
        count += 1
        candidate = f"{name}_{count}"
    return candidate
