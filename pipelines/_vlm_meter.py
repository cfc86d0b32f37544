"""What training a vision-language model spends: tokens through its language model, seconds."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmalign.pipelines._meter import Meter


class VlmMeter(Meter):
    """Counts what a vision-language model's training spends.

    Padding counts, as the network computes it, and so does the reference; what gradient
    checkpointing repeats does not.

    Attributes:
        tokens_forward: tokens that went through the language model.
        tokens_backward: tokens whose hidden states received a gradient.
    """

    names = ("tokens_forward", "tokens_backward")
    tokens_forward: int
    tokens_backward: int

    def watch(self, model: Any) -> None:
        """Count the tokens of a model of transformers from now on."""
        model.model.language_model.register_forward_hook(self._after, with_kwargs=True)

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
