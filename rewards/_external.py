"""What rewards outside this process are asked, and what they may answer.

One JSON object each way; images are PNG files in base64, and there is one reward per sample:

    {"prompts": ["a cat", ...], "images": ["iVBORw0...", ...]}
    {"rewards": [0.5, ...]}

For answers, `prompts` are the questions, `images` lists those of each question, and `responses` has
the answers, with whatever else is known of them in `fields`:

    {"prompts": [...], "responses": ["A cat.", ...], "images": [["iVBORw0..."], ...],
     "fields": [{"image_id": 42}, ...]}

A reply is a stranger's: it is bounded in size, read as JSON and nothing else, and checked entry by
entry. `{"error": "why"}` instead of rewards shows its text to the user.
"""

from __future__ import annotations

import base64
import io
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmalign.data.images import encode_png, read_image_bytes
from mmalign.endpoint import excerpt
from mmalign.scoring import BadScoreError, ScorerError, divide, in_order, take
from mmalign.types import ImageRef, InputError, Modality

if TYPE_CHECKING:
    from PIL import Image

    from mmalign.types import Response

UNBOUNDED = (float("-inf"), float("inf"))


class ExternalReward(ABC):
    """A reward computed by another process; never differentiable.

    Attributes:
        name: name in reports and messages.
        modality: `image`, or `text` for answers.
        range: smallest and largest score, as the user states it.
        timeout: seconds that one batch may take.
        scores_sets: whether a score depends on the other samples of the prompt, so that a request
            holds all of them, however many they are.
    """

    differentiable = False

    def __init__(
        self,
        name: str,
        *,
        timeout: float,
        batch_size: int,
        range: Sequence[float],
        modality: Modality = "image",
        scores_sets: bool = False,
    ) -> None:
        """Check the options that every such reward has.

        Raises:
            InputError: for a time-out or batch size that is not positive, no range, or a modality
                that has no protocol.
        """
        if modality not in ("image", "text"):
            raise InputError(f"reward {name}: modality must be image or text, not {modality!r}")
        if not timeout > 0 or batch_size < 1:
            raise InputError(f"reward {name}: timeout and batch_size must be positive")
        if len(range) != 2 or not range[0] < range[1]:
            raise InputError(f"reward {name}: range must be the smallest and the largest score")
        self.name, self.timeout, self.batch_size = name, float(timeout), batch_size
        self.modality: Modality = modality
        self.range = (float(range[0]), float(range[1]))
        self.scores_sets = scores_sets

    def __call__(self, samples: Tensor | Sequence[Response], prompts: Sequence[str]) -> Tensor:
        """Score images (B, 3, H, W) in [0, 1], or answers; returns (B,) float32.

        Raises:
            ScorerError: there is no usable reply.
            BadScoreError: the reply has a wrong number of rewards, or one that is not a number.
        """
        batches = divide(prompts, self.batch_size, whole=self.scores_sets)

        def score(batch: Sequence[int]) -> list[float]:
            request = _request(take(samples, batch), [prompts[row] for row in batch], batch)
            return self._rewards(self._ask(request), batch)

        parts = self._each(score, batches)
        found = torch.tensor([value for part in parts for value in part], dtype=torch.float32)
        scores = in_order(found, [row for batch in batches for row in batch])
        return scores.to(samples.device) if isinstance(samples, Tensor) else scores

    def _each(
        self, score: Callable[[Sequence[int]], list[float]], batches: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Score batches of samples, given by number, one after the other."""
        return [score(batch) for batch in batches]

    @abstractmethod
    def _ask(self, request: bytes) -> bytes:
        """Send one line of JSON and return the reply, at most `MAX_REPLY_BYTES` long."""

    def _failure(self, problem: str) -> ScorerError:
        return ScorerError(f"reward {self.name}: {problem}")

    def _rewards(self, reply: bytes, batch: Sequence[int]) -> list[float]:
        """Read the rewards of the samples with these numbers."""
        rewards = self._content(reply).get("rewards")
        if not isinstance(rewards, list):
            raise self._failure(f'"rewards" of its reply is not a list: {excerpt(reply)}')
        if len(rewards) != len(batch):
            raise BadScoreError(f"returned {len(rewards)} instead of {len(batch)} scores", None)
        for row, value in zip(batch, rewards, strict=True):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise BadScoreError(f"returned {json.dumps(value)[:80]}", row)
            if not _is_finite(value):
                raise BadScoreError(f"returned {str(value)[:80]}", row)
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


def _request(
    samples: Tensor | Sequence[Response], prompts: Sequence[str], batch: Sequence[int]
) -> bytes:
    """Write a request; samples are named in messages by their numbers in `batch`."""
    request: dict[str, Any] = {"prompts": list(prompts)}
    if isinstance(samples, Tensor):
        request["images"] = [
            _base64(encode_png(image, f"sample {index}"))
            for index, image in zip(batch, samples, strict=True)
        ]
    else:
        request["responses"] = [sample.text for sample in samples]
        request["images"] = [[_base64(_file(i)) for i in sample.images] for sample in samples]
        request["fields"] = [dict(sample.fields) for sample in samples]
    try:
        return json.dumps(request).encode("ascii") + b"\n"
    except TypeError as error:  # a row of a parquet file may hold what JSON cannot
        raise InputError(f"sample {batch[0]} and following: {error}") from error


def _file(image: Image.Image | ImageRef) -> bytes:
    if isinstance(image, ImageRef):
        return read_image_bytes(image)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False
