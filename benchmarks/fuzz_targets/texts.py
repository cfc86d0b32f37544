"""Readers of prompts, configurations, logs and questions."""

from __future__ import annotations

from pathlib import Path

from .harness import target


@target(b"red\nblue\n")
def prompts_text(folder: Path, data: bytes) -> None:
    """Read a text file of prompts."""
    from mmalign.data.prompts import read_prompts

    (folder / "prompts.txt").write_bytes(data)
    assert all(read_prompts(folder / "prompts.txt"))


@target({"prompt": "red"})
def prompts_jsonl(folder: Path, data: bytes) -> None:
    """Read JSON lines of prompts."""
    from mmalign.data.prompts import read_prompts

    (folder / "prompts.jsonl").write_bytes(data)
    assert all(read_prompts(folder / "prompts.jsonl"))


@target(
    b"model: x\nprompts: prompts.txt\nlora: {rank: 2}\nlearning_rate: 1e-4\n",
    b"rewards: [{name: clip, weight: 1}]\nprompts: prompts.txt\n",
)
def config_yaml(folder: Path, data: bytes) -> None:
    """Read a configuration."""
    from mmalign.config import D3poConfig
    from mmalign.options import parse_options
    from mmalign.preflight import check_config

    (folder / "config.yaml").write_bytes(data)
    (folder / "prompts.txt").write_text("red\n")
    config = parse_options(D3poConfig, [f"--config={folder / 'config.yaml'}"], command="train")
    config.output_dir, config.prompts = str(folder / "out"), str(folder / "prompts.txt")
    check_config(config)


@target(b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null}\n')
def metrics_log(folder: Path, data: bytes) -> None:
    """Read and continue a log."""
    from mmalign.metrics_log import MetricsLog, read_metrics

    (folder / "metrics.jsonl").write_bytes(data)
    read_metrics(folder / "metrics.jsonl")
    MetricsLog(folder / "metrics.jsonl", keep_until=1).close()


@target({"id": "q", "image": "a.png", "prompt": "What?"})
def topic_questions(folder: Path, data: bytes) -> None:
    """Read the questions of topic overwriting."""
    from mmalign.config import TopicOverwriteConfig
    from mmalign.topics.questions import read_questions

    (folder / "questions.jsonl").write_bytes(data)
    read_questions(TopicOverwriteConfig(questions=str(folder / "questions.jsonl")))
