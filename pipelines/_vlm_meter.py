"""What training a vision-language model spends: tokens through its language model, seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mmalign.processes import added_up, is_main


class VlmMeter:
    """Counts between the begin and the end of `running`; kept in the checkpoint.

    Padding counts, as the network computes it, and so does the reference; what gradient
    checkpointing repeats does not. Each process counts its own; what is returned is the sum, so
    all of several processes ask together.

    Attributes:
        tokens_forward: tokens that went through the language model.
        tokens_backward: tokens whose hidden states received a gradient.
    """

    def __init__(self) -> None:
        """Start at nothing."""
        self.tokens_forward = 0
        self.tokens_backward = 0
        self._seconds = 0.0
        self._since: float | None = None

    def watch(self, model: Any) -> None:
        """Count the tokens of a model of transformers from now on."""
        model.model.language_model.register_forward_hook(self._after, with_kwargs=True)

    def cost(self) -> dict[str, float]:
        """Return everything, as `summary.json` has it."""
        tokens = {
            "tokens_forward": self.tokens_forward,
            "tokens_backward": self.tokens_backward,
        }
        return {**added_up(tokens), "train_seconds": self._train_seconds()}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count inside the block."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._seconds, self._since = self._train_seconds(), None

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, for a checkpoint."""
        return self.cost()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the counts of a checkpoint."""
        self.tokens_forward = state["tokens_forward"] if is_main() else 0
        self.tokens_backward = state["tokens_backward"] if is_main() else 0
        self._seconds = state["train_seconds"]
        self._since = None if self._since is None else time.monotonic()

    def _train_seconds(self) -> float:
        running = 0.0 if self._since is None else time.monotonic() - self._since
        return self._seconds + running

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self._since is None:
            return
        hidden: Any = output.last_hidden_state
        tokens = hidden.shape[0] * hidden.shape[1]
        self.tokens_forward += tokens
        if hidden.requires_grad:

            def count(gradient: Tensor) -> None:
                self.tokens_backward += tokens

            hidden.register_hook(count)
