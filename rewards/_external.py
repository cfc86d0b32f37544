"""What rewards outside this process are asked, and what they may answer.

One JSON object each way; images are PNG files in base64, and there is one reward per image:

    {"prompts": ["a cat", ...], "images": ["iVBORw0...", ...]}
    {"rewards": [0.5, ...]}

A reply is a stranger's: it is bounded in size, read as JSON and nothing else, and checked entry by
entry. `{"error": "why"}` instead of rewards shows its text to the user.
"""

from __future__ import annotations

import base64
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmalign.data.images import encode_png
from mmalign.endpoint import excerpt
from mmalign.scoring import BadScoreError, ScorerError
from mmalign.types import InputError, Modality

UNBOUNDED = (float("-inf"), float("inf"))


class ExternalReward(ABC):
    """A reward computed by another process; never differentiable.

    Attributes:
        name: name in reports and messages.
        range: smallest and largest score, as the user states it.
        timeout: seconds that one batch may take.
    """

    modality: Modality = "image"
    differentiable = False

    def __init__(
        self, name: str, *, timeout: float, batch_size: int, range: Sequence[float]
    ) -> None:
        """Check the options that every such reward has.

        Raises:
            InputError: for a time-out or batch size that is not positive, or no range.
        """
        if not timeout > 0 or batch_size < 1:
            raise InputError(f"reward {name}: timeout and batch_size must be positive")
        if len(range) != 2 or not range[0] < range[1]:
            raise InputError(f"reward {name}: range must be the smallest and the largest score")
        self.name, self.timeout, self.batch_size = name, float(timeout), batch_size
        self.range = (float(range[0]), float(range[1]))

    def __call__(self, samples: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1]; returns (B,) float32 on the images' device.

        Raises:
            ScorerError: there is no usable reply.
            BadScoreError: the reply has a wrong number of rewards, or one that is not a number.
        """
        scores: list[float] = []
        for start in range(0, len(samples), self.batch_size):
            rows = slice(start, start + self.batch_size)
            request = _request(samples[rows], prompts[rows])
            scores += self._rewards(self._ask(request), start, len(samples[rows]))
        return torch.tensor(scores, dtype=torch.float32, device=samples.device)

    @abstractmethod
    def _ask(self, request: bytes) -> bytes:
        """Send one line of JSON and return the reply, at most `MAX_REPLY_BYTES` long."""

    def _failure(self, problem: str) -> ScorerError:
        return ScorerError(f"reward {self.name}: {problem}")

    def _rewards(self, reply: bytes, start: int, count: int) -> list[float]:
        """Read the rewards of the samples from `start` on."""
        rewards = self._content(reply).get("rewards")
        if not isinstance(rewards, list):
            raise self._failure(f'"rewards" of its reply is not a list: {excerpt(reply)}')
        if len(rewards) != count:
            raise BadScoreError(f"returned {len(rewards)} instead of {count} scores", None)
        for index, value in enumerate(rewards):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise BadScoreError(f"returned {json.dumps(value)[:80]}", start + index)
            if not _is_finite(value):
                raise BadScoreError(f"returned {str(value)[:80]}", start + index)
        return [float(value) for value in rewards]

    def _content(self, reply: bytes) -> dict[str, Any]:
        try:
            content = json.loads(reply)
        except (ValueError, RecursionError):
            kind = "an HTML page" if reply.lstrip()[:1] == b"<" else "something else"
            raise self._failure(f"its reply is {kind}, not JSON: {excerpt(reply)}") from None
        if not isinstance(content, dict):
            raise self._failure(f"its reply is not a JSON object: {excerpt(reply)}")
        if "rewards" not in content:
            said = content.get("error", f"the keys are {', '.join(map(str, content)) or 'none'}")
            raise self._failure(f'its reply has no "rewards": {str(said)[:200]}')
        return content


def _request(samples: Tensor, prompts: Sequence[str]) -> bytes:
    images = [
        base64.b64encode(encode_png(image, f"sample {index}")).decode("ascii")
        for index, image in enumerate(samples)
    ]
    return json.dumps({"prompts": list(prompts), "images": images}).encode("ascii") + b"\n"


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False
