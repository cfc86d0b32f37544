"""Any Python function as a reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from mmalign.rewards import import_dotted
from mmalign.scoring import to_scores
from mmalign.types import InputError, Modality


class CallableReward:
    """Calls `fn(images, prompts)` and checks what comes back.

    The function may return a tensor, an array or a list of numbers, one per image. A differentiable
    one returns a tensor that is connected to `images`.
    """

    def __init__(
        self,
        function: str | Callable[..., Any],
        name: str | None = None,
        differentiable: bool = False,
        range: tuple[float, float] = (float("-inf"), float("inf")),
        modality: Modality = "image",
        scores_sets: bool = False,
    ) -> None:
        """Wrap a function.

        Args:
            function: the function, or its dotted path `module:function`.
            name: name in reports; the function's own when omitted.
            differentiable: whether gradients reach the images.
            range: smallest and largest score.
            modality: `image`, or `text` for `fn(responses, prompts)`, or `audio`.
            scores_sets: whether a sample is scored against the others of its prompt: a call then
                holds whole prompts.

        Raises:
            InputError: if the path cannot be imported or is not callable.
        """
        found = import_dotted(function) if isinstance(function, str) else function
        if not callable(found):
            raise InputError(f"reward {function!r} is a {type(found).__name__}, not a callable")
        self.function: Callable[..., Any] = found
        self.name = name or str(getattr(found, "__name__", type(found).__name__))
        self.differentiable, self.modality = differentiable, modality
        self.scores_sets = scores_sets
        self.range = (float(range[0]), float(range[1]))

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1]; returns (B,) on the images' device.

        Raises:
            InputError: if the function returns None, NaN, infinity or a wrong number of scores.
        """
        scores = to_scores(self.function(samples, prompts), len(samples))
        return scores.to(samples.device) if isinstance(samples, Tensor) else scores
