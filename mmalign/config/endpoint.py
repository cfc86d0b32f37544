"""Servers of language models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class EndpointConfig:
    """An OpenAI-compatible server.

    Attributes:
        url: base address, such as `http://127.0.0.1:8000/v1`.
        model_name: model as the server calls it.
        api_key_env: environment variable that holds the key, if the server wants one.
        timeout: seconds that one attempt may take.
        retries: attempts after the first, when the server is out of reach or busy.
        concurrency: requests under way at a time.
        extra: further fields of every request.
        revision: names what answers behind the address. Only with it does a cache of scores keep
            what a reward was told; another one has everything asked again.
    """

    url: str = ""
    model_name: str = ""
    api_key_env: str | None = None
    timeout: float = 120.0
    retries: int = 5
    concurrency: int = 8
    extra: dict[str, Any] = field(default_factory=dict)
    revision: str | None = None
