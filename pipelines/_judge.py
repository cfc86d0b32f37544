"""A language model behind a server as the judge of a benchmark."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign.endpoint import JsonClient, excerpt
from mmalign.hallucination.judge import Judge
from mmalign.types import InputError

if TYPE_CHECKING:
    from mmalign.config import JudgeConfig

BUSY = (408, 409, 425, 429)
"""Statuses that ask to come back later, as servers of language models give them."""


def endpoint_judge(config: JudgeConfig, folder: Path) -> Judge:
    """Make a judge that keeps its replies in `judge_replies.jsonl` of a folder.

    Raises:
        InputError: no address or model, or an environment variable without a key.
    """
    if not config.url or not config.model_name:
        raise InputError("judge.url and judge.model_name are required for an endpoint as judge")
    client = JsonClient(
        f"{config.url.rstrip('/')}/chat/completions",
        label=f"judge {config.model_name}",
        timeout=config.timeout,
        retries=config.retries,
        headers=_headers(config.api_key_env),
        retry_statuses=BUSY,
    )

    def ask(prompt: str) -> str:
        return _text(client.post(json.dumps(_request(config, prompt)).encode()))

    return Judge(
        ask,
        name=json.dumps([config.url, _request(config, "")], sort_keys=True),
        replies=folder / "judge_replies.jsonl",
        concurrency=config.concurrency,
        attempts=config.retries + 1,
    )


def check_judge(config: JudgeConfig, *, used: bool) -> None:
    """Refuse settings of an endpoint that nobody would ask.

    Raises:
        InputError: `url` or `model_name` is given although the judge is another.
    """
    if not used and (config.url or config.model_name):
        raise InputError(
            "judge.url is given, but judge_by is not endpoint: say --judge_by endpoint"
        )


def _request(config: JudgeConfig, prompt: str) -> dict[str, Any]:
    return {
        "model": config.model_name,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
        **config.extra,
    }


def _headers(variable: str | None) -> dict[str, str]:
    if variable is None:
        return {}
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise InputError(f"judge.api_key_env: the environment variable {variable} has no key")
    return {"Authorization": f"Bearer {key}"}


def _text(reply: bytes) -> str:
    """Take the text out of a chat completion.

    Raises:
        ValueError: saying what came instead.
    """
    try:
        text = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, RecursionError, KeyError, IndexError, TypeError):
        raise ValueError(f"its reply is no chat completion: {excerpt(reply)}") from None
    if not isinstance(text, str):
        raise ValueError(f"its reply has no text: {excerpt(reply)}")
    return text
