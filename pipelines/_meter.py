"""What a method spends while it trains: rows through the denoiser, reward queries, seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from mmalign.processes import added_up, is_main

COUNTS = ("unet_forwards", "unet_backwards", "reward_queries")


class Score(Protocol):
    """Scores images (B, 3, H, W) of prompts, (B,); `names` are theirs in messages."""

    def __call__(
        self, samples: Tensor, prompts: Sequence[str], names: Sequence[str] | None = None
    ) -> Tensor: ...


class Meter:
    """Counts between `running` and its end, except where it is `paused`; kept in the checkpoint.

    Each process counts its own; what is returned is the sum, so all of several processes ask
    together. A subclass names its counts, which are attributes that start at 0.
    """

    names: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        """Start at nothing."""
        for name in self.names:
            setattr(self, name, 0)
        self._seconds = 0.0
        self._since: float | None = None

    @property
    def train_seconds(self) -> float:
        """Wall time of the training loop, checkpoints included, added up over resumed runs.

        A checkpoint holds the time up to when its writing began.
        """
        running = 0.0 if self._since is None else time.monotonic() - self._since
        return self._seconds + running

    def counts(self) -> dict[str, float]:
        """Return what was counted, without the time: the same in every run of a configuration."""
        return added_up({name: getattr(self, name) for name in self.names})

    def cost(self) -> dict[str, float]:
        """Return everything, as `summary.json` has it."""
        return {**self.counts(), "train_seconds": self.train_seconds}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count inside the block."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing inside the block, which lies in a `running` one."""
        self._stop()
        try:
            yield
        finally:
            self._since = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, for a checkpoint."""
        return self.cost()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the counts of a checkpoint."""
        for name in self.names:
            setattr(self, name, state[name] if is_main() else 0)
        self._seconds = state["train_seconds"]
        self._since = None if self._since is None else time.monotonic()

    def _stop(self) -> None:
        self._seconds, self._since = self.train_seconds, None


class CostMeter(Meter):
    """Counts what an image generator's training spends.

    Both halves of classifier-free guidance count, and so do the reference, sampling, a distilling
    teacher, and a forward that gradient checkpointing repeats. Evaluation does not.

    Attributes:
        unet_forwards: rows (one latent image each) that went through the denoiser.
        unet_backwards: rows whose output received a gradient.
        reward_queries: images scored by the training reward.
    """

    names = COUNTS
    unet_forwards: int
    unet_backwards: int
    reward_queries: int

    def __init__(self) -> None:
        """Start at nothing."""
        super().__init__()
        self._watched: set[int] = set()

    def watch(self, denoiser: nn.Module) -> None:
        """Count a denoiser's rows from now on; a second call for the same one changes nothing."""
        if id(denoiser) in self._watched:
            return
        self._watched.add(id(denoiser))
        # Before the forward: a recomputation in the backward pass stops early, in the middle of it.
        denoiser.register_forward_pre_hook(self._before, with_kwargs=True)
        denoiser.register_forward_hook(self._after)

    def counted(self, reward: Score) -> Score:
        """Wrap a reward so that its queries count."""

        def score(
            samples: Tensor, prompts: Sequence[str], names: Sequence[str] | None = None
        ) -> Tensor:
            if self._since is not None:
                self.reward_queries += len(samples)
            return reward(samples, prompts, names)

        return score

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._since is not None:
            self.unet_forwards += len(args[0] if args else kwargs["sample"])

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        sample = output[0] if isinstance(output, tuple) else output.sample
        if self._since is None or not sample.requires_grad:
            return
        rows = len(sample)
        # diffusers' own checkpointing recomputes block by block, which no hook of the whole sees.
        repeated = rows if getattr(module, "is_gradient_checkpointing", False) else 0

        def count(gradient: Tensor) -> None:
            self.unet_backwards += rows
            self.unet_forwards += repeated

        sample.register_hook(count)
