"""Readers of what servers and programs reply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .harness import target


@target({"choices": [{"message": {"content": "Yes"}}]})
def endpoint_text(folder: Path, data: bytes) -> None:
    """Read a server's chat completion."""
    _endpoint(data).generate([_question()], _generation())


@target(
    {
        "choices": [
            {"logprobs": {"content": [{"top_logprobs": [{"token": "Yes", "logprob": -0.1}]}]}}
        ]
    }
)
def endpoint_logprobs(folder: Path, data: bytes) -> None:
    """Read a server's probabilities of yes and no."""
    for yes, no in _endpoint(data).yes_no([_question()], 1):
        assert 0 <= yes <= 1
        assert 0 <= no <= 1


def _endpoint(reply: bytes) -> Any:
    from mmalign.chat import ChatEndpoint
    from mmalign.config import EndpointConfig

    endpoint = ChatEndpoint(EndpointConfig(url="http://127.0.0.1:9/v1", model_name="m"))
    endpoint._client.post = lambda body: reply  # type: ignore[method-assign]
    return endpoint


def _question() -> Any:
    from mmalign.types import Question

    return Question("Is there a cat?", ())


def _generation() -> Any:
    from mmalign.config import GenerationConfig

    return GenerationConfig()


@target({"rewards": [0.5, 1]})
def scorer_reply(folder: Path, data: bytes) -> None:
    """Read a program's or server's scores."""
    import torch

    from mmalign.rewards.http import HttpReward
    from mmalign.scoring import score_samples

    reward: Any = HttpReward("http://127.0.0.1:9/")
    reward._ask = lambda request: data
    assert score_samples(reward, torch.zeros(2, 3, 4, 4), ["a", "b"]).isfinite().all()
