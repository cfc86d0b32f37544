"""A language model behind a server as the judge of a benchmark."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.chat import ChatEndpoint
from mmalign.config import GenerationConfig
from mmalign.hallucination.judge import Judge
from mmalign.types import InputError, Question

if TYPE_CHECKING:
    from mmalign.config import JudgeConfig

REPLIES = "judge_replies.jsonl"


def endpoint_judge(config: JudgeConfig, folder: Path) -> Judge:
    """Make a judge that keeps its replies in `judge_replies.jsonl` of a folder.

    Raises:
        InputError: no address or model, or an environment variable without a key.
    """
    endpoint = ChatEndpoint(config)
    settings = GenerationConfig(
        max_new_tokens=config.max_tokens, temperature=config.temperature, seed=config.seed
    )

    def ask(prompt: str) -> str:
        return endpoint.generate([Question(prompt)], settings)[0]

    return Judge(
        ask,
        name=f"{endpoint.fingerprint} {sorted(asdict(settings).items())}",
        replies=folder / REPLIES,
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
