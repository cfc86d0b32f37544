"""Rewards over HTTP: what is sent, and how long a server is waited for."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import pytest
import torch
from json_server import json_server
from scorers import IMAGES, PROMPTS, count_pixels, over_http

from mmalign import endpoint
from mmalign.config import RewardConfig
from mmalign.rewards import http, load_reward
from mmalign.scoring import score_samples
from mmalign.types import InputError

pytestmark = pytest.mark.usefixtures("no_pauses")


def test_http_sends_what_the_protocol_says_in_batches() -> None:
    with json_server(count_pixels) as running:
        reward = over_http(running.url, batch_size=2, range=[0, 255])
        scores = score_samples(reward, IMAGES, PROMPTS)
    # Requests of several threads come in any order.
    assert sorted(call["prompts"] for call in running.calls) == sorted([PROMPTS[:2], PROMPTS[2:]])
    expected = (IMAGES * 255).round().mean((1, 2, 3))
    torch.testing.assert_close(scores, expected)
    assert (reward.differentiable, reward.range) == (False, (0.0, 255.0))


def test_proxy_is_not_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9/")
    monkeypatch.delenv("no_proxy", raising=False)
    with json_server(count_pixels) as running:
        assert len(score_samples(over_http(running.url, retries=0), IMAGES, PROMPTS)) == 3


def test_server_errors_are_tried_again() -> None:
    statuses = iter([500, 503, 200])
    with json_server(lambda r: (next(statuses), count_pixels(r)[1])) as running:
        assert len(score_samples(over_http(running.url), IMAGES, PROMPTS)) == 3
    assert len(running.calls) == 3


@pytest.mark.parametrize(
    ("status", "attempts", "message"),
    [
        (500, 3, r"answers 500 .* \(3 attempts\)"),
        (404, 1, "answers 404"),
        (302, 1, "answers 302 .*redirects are not followed"),
    ],
)
def test_statuses_that_stay(status: int, attempts: int, message: str) -> None:
    headers = {"Location": "/elsewhere"}
    with (
        json_server(lambda _: (status, b"<html>"), headers) as running,
        pytest.raises(InputError, match=message),
    ):
        score_samples(over_http(running.url, retries=2), IMAGES, PROMPTS)
    assert len(running.calls) == attempts


def test_what_a_refusal_says_is_shown() -> None:
    said = json.dumps({"error": "sample 1: not an image\nof an allowed format"}).encode()
    with (
        json_server(lambda _: (422, said)) as running,
        pytest.raises(InputError, match=r"answers 422 .*: sample 1: not an image of an allowed"),
    ):
        score_samples(over_http(running.url), IMAGES, PROMPTS)
    assert len(running.calls) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_when_it_says_so(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More often than there are retries: it answers, only later."""
    pauses: list[float] = []
    monkeypatch.setattr(endpoint.time, "sleep", pauses.append)
    answers = iter([status] * 6 + [200])
    with json_server(
        lambda r: (next(answers), count_pixels(r)[1]), {"Retry-After": "7"}
    ) as running:
        assert len(score_samples(over_http(running.url, retries=1), IMAGES, PROMPTS)) == 3
    assert pauses == [7.0] * 6


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint.time, "sleep", lambda _: None)
    monkeypatch.setattr(http, "PATIENCE", 5.0)
    headers = {"Retry-After": "999999999"}  # cut to half a minute, which is longer than that
    with (
        json_server(lambda _: (503, b'{"error": "full"}'), headers) as running,
        pytest.raises(InputError, match=r"answers 503 .*: full \(2 attempts\)"),
    ):
        score_samples(over_http(running.url, retries=1), IMAGES, PROMPTS)


@pytest.mark.parametrize("value", ["Wed, 21 Oct 2026 07:28:00 GMT", "-5", "soon", ""])
def test_nonsense_in_retry_after_is_an_ordinary_error(value: str) -> None:
    with (
        json_server(lambda _: (503, b""), {"Retry-After": value}) as running,
        pytest.raises(InputError, match=r"answers 503 .*\(2 attempts\)"),
    ):
        score_samples(over_http(running.url, retries=1), IMAGES, PROMPTS)
    assert len(running.calls) == 2


def test_several_requests_are_under_way_and_keep_their_order() -> None:
    late = threading.Event()
    most = [0]

    def answer(request: dict[str, Any]) -> tuple[int, bytes]:
        most[0] = max(most[0], running.under_way)
        if request["prompts"] == ["0"]:
            late.wait(10)  # the first answer is the last to come
        elif request["prompts"] == ["3"]:
            late.set()
        return 200, json.dumps({"rewards": [float(p) for p in request["prompts"]]}).encode()

    prompts = [str(number) for number in range(6)]
    images = IMAGES[:1].expand(6, -1, -1, -1)
    with json_server(answer) as running:
        scores = score_samples(over_http(running.url, batch_size=1, concurrency=3), images, prompts)
    assert scores.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert 1 < most[0] <= 3


def test_a_bad_score_of_a_later_request_names_its_sample() -> None:
    def answer(request: dict[str, Any]) -> tuple[int, bytes]:
        bad = request["prompts"] == PROMPTS[2:]
        return 200, json.dumps({"rewards": [None if bad else 1.0]}).encode()

    with (
        json_server(answer) as running,
        pytest.raises(InputError, match="http returned null for sample 2"),
    ):
        score_samples(over_http(running.url, batch_size=1), IMAGES, PROMPTS)


def test_token_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORER_TOKEN", "secret")
    with json_server(count_pixels) as running:
        score_samples(over_http(running.url, token_env="SCORER_TOKEN"), IMAGES, PROMPTS)
    assert running.headers[0]["Authorization"] == "Bearer secret"
    with pytest.raises(InputError, match=r"token_env: the environment variable NO_SUCH has no key"):
        over_http(running.url, token_env="NO_SUCH")


def test_server_that_is_down() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
    with pytest.raises(InputError, match=r"^reward http: http.* cannot be reached: .*\(2 attempts"):
        score_samples(over_http(url, retries=1), IMAGES, PROMPTS)


def test_server_that_hangs() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        with pytest.raises(InputError, match=r"no answer within 0\.1 s \(2 attempts\)"):
            score_samples(over_http(url, timeout=0.1, retries=1), IMAGES, PROMPTS)


def test_server_that_drips() -> None:
    """Every read is quick, but together they last for ever."""
    ended = threading.Event()

    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
            while not ended.wait(0.02):
                try:
                    connection.sendall(b" ")
                except OSError:
                    return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=drip, args=(listener,), daemon=True).start()
        reward = over_http(f"http://127.0.0.1:{listener.getsockname()[1]}/", timeout=0.3, retries=0)
        with pytest.raises(InputError, match=r"no answer within 0\.3 s"):
            score_samples(reward, IMAGES, PROMPTS)
        ended.set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "file:///etc/passwd"}, "not a plain http"),
        ({"url": "localhost:8000"}, "not a plain http"),
        ({"url": "http://user:word@host/"}, "password"),
        ({"url": "http://host:port/"}, "port"),
        ({"url": "http://host/", "retries": -1}, "retries"),
        ({"url": "http://host/", "timeout": 0}, "timeout"),
        ({"url": "http://host/", "range": [1, 0]}, "range"),
        ({"url": "http://host/", "concurrency": 0}, "concurrency"),
        ({"url": "http://host/", "modality": "audio"}, "modality must be image or text"),
        ({"address": "http://host/"}, "it takes: url"),
    ],
)
def test_http_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_reward(RewardConfig(name="http", options=options))
