"""Training on images that the policy samples itself.

A method's pipeline gives a function that makes its step. Prompts, their encodings, the sampler and
the rewards are wired here, the rest of the run in `_training`. All randomness of a step is keyed by
(seed, step, row of the step), so a resumed run draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from mmalign.config import OnlineConfig, TrajectoryConfig
from mmalign.data.order import StepSampler
from mmalign.data.prompts import read_prompts
from mmalign.diffusion import SamplerGrid
from mmalign.objectives.d3po import d3po_loss
from mmalign.pipelines._evaluation import check_judge, resolve_device
from mmalign.pipelines._meter import Score
from mmalign.pipelines._reported import RewardLog, with_watched
from mmalign.pipelines._training import Job, Run, Step, batch_plan, prepare, train_and_compare
from mmalign.randomness import Key, keyed_generator
from mmalign.report import RunSummary
from mmalign.rewards import load_rewards
from mmalign.rewards.combine import CombinedReward
from mmalign.rollout import Sampler, keyed_noise
from mmalign.scoring import divide, in_order, take
from mmalign.types import Condition, ImageAdapter, InputError, LogRatios

ALL_TIED = "every candidate has the same reward as its rival"
ENCODE_BATCH = 32
DECODE_BATCH = 8


class PromptBatch(NamedTuple):
    """B prompts of one micro-batch.

    `keys` are the keys of each row's draws: (seed, step, 0, row of the step). They do not depend
    on how the rows of a step are divided into micro-batches and processes. `step_key` is that of
    draws which all rows of a step share. `pair_ids` name the rows in messages.
    """

    prompts: tuple[str, ...]
    keys: tuple[tuple[Key, ...], ...]
    step_key: tuple[Key, ...]
    pair_ids: tuple[str, ...]
    condition: Condition


@dataclass(frozen=True, kw_only=True)
class OnlineRun:
    """What an online method's step works with.

    Attributes:
        config: options of the run.
        run: adapter, reference, accelerator and state.
        reward: the weighted sum that is trained on; its queries are counted.
        rewards: its terms one by one, (R, B); counted alike.
        negative: the encoded empty prompt, one row.
        grid: the sampler's steps.
        scores_sets: whether a reward compares the images of a prompt, so that no call may cut one.
    """

    config: OnlineConfig
    run: Run
    reward: Score
    rewards: Score
    negative: Condition
    grid: SamplerGrid
    scores_sets: bool = False

    def sampler(self, batch: PromptBatch) -> Sampler:
        """Make the sampler of a batch's prompts."""
        return Sampler(
            adapter=self.run.adapter,
            condition=batch.condition,
            negative=self.negative,
            grid=self.grid,
            guidance_scale=self.config.sampling.guidance_scale,
            eta=self.config.eta,
            autocast=self.run.accelerator.autocast,
        )

    def noise(self, batch: PromptBatch, *purpose: Key) -> Tensor:
        """Draw standard normal latents (B, C, h, w) for a purpose."""
        size = self.config.sampling
        shape = self.run.adapter.latent_shape(size.height, size.width)
        keys = [(*key, *purpose) for key in batch.keys]
        return keyed_noise(shape, keys, self.run.accelerator.device)

    def score(self, latents: Tensor, batch: PromptBatch, copies: int) -> Tensor:
        """Score clean latents (copies * B, C, h, w) of the batch's prompts, (copies, B) float32."""
        return self._score(self.reward, latents, batch, copies).view(copies, -1)

    def score_each(self, latents: Tensor, batch: PromptBatch, copies: int) -> Tensor:
        """Score like `score`, reward by reward, (R, copies, B)."""
        count = len(batch.prompts)
        return self._score(self.rewards, latents, batch, copies).view(-1, copies, count)

    @torch.no_grad()
    def _score(self, reward: Score, latents: Tensor, batch: PromptBatch, copies: int) -> Tensor:
        parts = (latents[i : i + DECODE_BATCH] for i in range(0, len(latents), DECODE_BATCH))
        images = torch.cat([self.run.adapter.decode(part) for part in parts])
        scores = reward(images, batch.prompts * copies, batch.pair_ids * copies)
        return scores.float().to(latents.device)


def drawn_steps(batch: PromptBatch, candidates: Sequence[int], count: int | None) -> list[int]:
    """Choose the sampler steps that a step trains, in order; all when `count` is None."""
    if count is None or count >= len(candidates):
        return list(candidates)
    generator = keyed_generator(*batch.step_key, "trained steps")
    chosen = torch.randperm(len(candidates), generator=generator)[:count]
    return sorted(candidates[index] for index in chosen.tolist())


def stochastic_steps(online: OnlineRun) -> list[int]:
    """List the steps that draw noise, whose latents have a density.

    Raises:
        InputError: there are none, because `eta` is 0 or a consistency model takes one step only.
    """
    latents = torch.zeros(1, 1, 1, 1, device=online.run.accelerator.device)
    steps = []
    for index, timestep in enumerate(online.grid.timesteps.tolist()):
        prev = online.grid.prev_alphas[index : index + 1]
        move = online.run.adapter.transition(
            latents, latents, torch.tensor([timestep]), prev, eta=online.config.eta
        )
        if float(move.std) > 0:
            steps.append(index)
    if not steps and online.config.eta > 0:
        raise InputError("sampling.num_inference_steps: the only step draws no noise; take more")
    if not steps:
        raise InputError("eta: a deterministic sampler has no density to train on; set it above 0")
    return steps


def trajectory_loss(
    config: TrajectoryConfig, logratios: LogRatios
) -> tuple[Tensor, dict[str, Tensor]]:
    """Apply the configured loss to log-ratios of one sampler step."""
    return d3po_loss(
        logratios,
        beta=config.beta,
        preference=config,
        clip_range=config.clip_range,
        clamp=config.clamp,
    )


def mean_metrics(logged: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Average the metrics of several sampler steps."""
    return {name: torch.stack([step[name] for step in logged]).mean() for name in logged[0]}


def bridged_rewards(
    online: OnlineRun, latents: Tensor, batch: PromptBatch, decode_batch_size: int
) -> Tensor:
    """Score clean latents (N, C, h, w) with gradients, (N,), a few images at a time.

    N is a multiple of the batch's B: all its prompts once, then all again. Prompts are not cut
    where a reward compares their images.

    The gradient is taken down to the latents at once and the decoder's graph is freed, so that only
    one chunk of images is ever held; what is returned carries that gradient on to the sampler.
    """
    parts: list[Tensor] = []
    order: list[int] = []
    copies = len(latents) // len(batch.prompts)
    prompts, names = batch.prompts * copies, batch.pair_ids * copies
    for rows in divide(prompts, decode_batch_size, whole=online.scores_sets):
        own = take(latents, rows)
        leaf = own.detach().requires_grad_()
        with torch.enable_grad():
            images = online.run.adapter.decode(leaf)
            scores = online.reward(images, [prompts[r] for r in rows], [names[r] for r in rows])
        (gradient,) = torch.autograd.grad(scores.sum(), leaf)
        through = ((own - leaf.detach()) * gradient).flatten(1).sum(1)
        parts.append(scores.detach().to(through) + through)
        order += rows
    return in_order(torch.cat(parts), order)


def train_online(
    config: OnlineConfig,
    *,
    method: str,
    families: Sequence[str],
    make_step: Callable[[OnlineRun], Step],
    backward: bool = True,
    needs_gradient: bool = False,
) -> RunSummary:
    """Train on the policy's own samples, then evaluate, and write the run folder.

    Args:
        config: resolved options.
        method: name of the method for the summary.
        families: model families that the method trains.
        make_step: makes the step from the run.
        backward: False when the step back-propagates by itself.
        needs_gradient: the rewards must be differentiable.

    Raises:
        InputError: anything in the options, the prompts, the rewards or the model is unusable.
    """
    started = time.monotonic()
    check_judge(config.rewards, config.evaluation)
    prompts = read_prompts(config.prompts, config.num_prompts)
    loaded = load_rewards(config.rewards, resolve_device(config.device))
    reward = CombinedReward(loaded, config.combine, pooled=not needs_gradient)
    if needs_gradient:
        _check_gradient(reward, method)
    config = replace(config, evaluation=with_watched(config.evaluation, config.rewards))
    log = RewardLog()
    if len(reward.rewards) > 1:
        reward.watch = log.add

    def set_up(adapter: ImageAdapter, accelerator: Accelerator) -> Job:
        grid = adapter.sampler_grid(config.sampling.num_inference_steps)
        feed = _PromptFeed(config, prompts, adapter, accelerator)
        run = prepare(config, adapter, accelerator)
        online = OnlineRun(
            config=config,
            run=run,
            reward=run.meter.counted(reward),
            rewards=run.meter.counted(reward.each),
            negative=feed.negative,
            grid=grid,
            scores_sets=reward.scores_sets,
        )
        step = make_step(online)
        if reward.watch is not None:
            step = log.logged(step)
        return Job(
            run=run,
            step=step,
            batches=feed.batches,
            backward=backward,
            coupled=reward.compares or (needs_gradient and reward.scores_sets),
        )

    return train_and_compare(
        config, method=method, families=families, set_up=set_up, started=started
    )


def _check_gradient(reward: CombinedReward, method: str) -> None:
    if not reward.differentiable:
        trained = [n for n, config in reward.configs.items() if not config.eval_only]
        names = [name for name in trained if not reward.rewards[name].differentiable]
        why = f"{', '.join(names)} is not" if names else "a rank is not"
        raise InputError(f"rewards: {method} needs differentiable rewards, and {why}")
    if reward.compares:
        raise InputError(
            f"rewards: {method} follows the gradient of each sample by itself, so nothing that "
            "compares samples fits: use combine sum and normalize none, and scale by weight"
        )


class _PromptFeed:
    """Prompts encoded once, and the micro-batches that follow a step."""

    def __init__(
        self,
        config: OnlineConfig,
        prompts: Sequence[str],
        adapter: Any,
        accelerator: Accelerator,
    ) -> None:
        self._config, self._prompts, self._accelerator = config, prompts, accelerator
        _, rows, columns = adapter.latent_shape(config.sampling.height, config.sampling.width)
        factor = adapter.pixels_per_latent
        size = {"height": rows * factor, "width": columns * factor}
        parts = []
        for start in tqdm(range(0, len(prompts), ENCODE_BATCH), desc="encode prompts"):
            parts.append(adapter.encode_condition(prompts[start : start + ENCODE_BATCH], **size))
        self._condition = {k: torch.cat([part[k].cpu() for part in parts]) for k in parts[0]}
        self.negative = adapter.encode_condition([""], **size)

    def batches(self, start_step: int) -> Iterator[PromptBatch]:
        """Yield the micro-batches that follow `start_step` optimizer steps."""
        config = self._config
        plan = batch_plan(config, self._accelerator, start_step)
        sampler = StepSampler(len(self._prompts), plan)
        for step in range(start_step, config.max_steps):
            for position in plan.positions():
                yield self._batch(step, position, sampler.batch(step, position))

    def _batch(self, step: int, position: int, indices: list[int]) -> PromptBatch:
        device = self._accelerator.device
        rows = range(position * len(indices), (position + 1) * len(indices))
        return PromptBatch(
            prompts=tuple(self._prompts[index] for index in indices),
            keys=tuple((self._config.seed, step, 0, row) for row in rows),
            step_key=(self._config.seed, step, 0, 0),
            pair_ids=tuple(f"step {step + 1} prompt {index + 1}" for index in indices),
            condition={k: value[indices].to(device) for k, value in self._condition.items()},
        )
