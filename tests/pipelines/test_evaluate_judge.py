"""A language model judges for a benchmark: what it is asked, and what it may reply."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import RUNS, run, write
from json_server import json_server, says


def judged(url: str, **options: object) -> str:
    settings = {"url": url, "model_name": "judge", "retries": 1, **options}
    return " --judge_by endpoint " + " ".join(f"--judge.{k} {v}" for k, v in settings.items())


def test_objects_listed_by_a_language_model(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")

    def reply(request: dict[str, Any]) -> tuple[int, Any]:
        return 200, says('```json\n["dog", "bus"]\n```')

    with json_server(reply) as running:
        options = RUNS["objhal"] + judged(running.url, api_key_env="JUDGE_KEY")
        metrics = run("objhal", options)["metrics"]
        assert metrics["chairi"] == 0.5
        assert metrics["coco_sentence_num"] == 1  # "Two cats." is too short to be sent
        (request,) = running.calls
        assert running.paths == ["/v1/chat/completions"]
        assert running.headers[0]["Authorization"] == "Bearer secret"
        assert request["temperature"] == 0
        assert "A dog near a man." in request["messages"][0]["content"]
        run("objhal", options)
        assert len(running.calls) == 1  # the reply was kept
    for file in (files / "out").iterdir():
        assert "secret" not in file.read_text()


def test_ratings_by_a_language_model(files: Path) -> None:
    def reply(request: dict[str, Any]) -> tuple[int, Any]:
        good = "The model's answer: A dog." in request["messages"][0]["content"]
        rating = 5 if good and "bus" not in str(request) else 1
        return 200, says(f"Reason.\n**Rating:** {rating}")

    with json_server(reply) as running:
        options = RUNS["mmhal"] + judged(running.url)
        official = run("mmhal", options)["metrics"]
        fixed = run("mmhal", options + " --strict fixed")["metrics"]
        assert len(running.calls) == 2
    assert official["average_score"] == 0  # "**Rating:** 5" is read as 0
    assert fixed["average_score"] == 3
    assert fixed["hallucination_rate"] == 0.5


@pytest.mark.parametrize(
    ("status", "content", "message"),
    [
        (500, "x", "answers 500"),
        (401, "x", "answers 401"),
        (200, b"<html>down</html>", "its reply is an HTML page, not JSON"),
        (200, {"choices": []}, "its reply has no choices"),
        (200, {"choices": [{"message": {"content": None}}]}, "has no text"),
        (200, "I would rather not say.", "has no 'Rating: N'"),
    ],
)
def test_judge_that_replies_garbage(
    files: Path, capsys: pytest.CaptureFixture[str], status: int, content: Any, message: str
) -> None:
    body = says(content) if isinstance(content, str) else content
    with json_server(lambda _: (status, body)) as running:
        run("mmhal", RUNS["mmhal"] + judged(running.url), code=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: mmhal.json entry ")
    assert message in error


def test_judge_that_is_down(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    run("objhal", RUNS["objhal"] + judged(url, retries=0), code=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: objhal.jsonl line 1: endpoint judge: http://127.0.0.1:")
    assert "cannot be reached" in error


def test_saved_reviews(files: Path) -> None:
    official = [{"choices": [{"message": {"content": f"Rating: {s}"}}]} for s in (6, 2)]
    write(files / "reviews.json", official)
    metrics = run("mmhal", RUNS["mmhal"] + " --judge_by reviews --reviews reviews.json")["metrics"]
    assert metrics["average_score"] == 4
    assert metrics["informativeness"] == pytest.approx(5 / 2 / 3 * 100)
