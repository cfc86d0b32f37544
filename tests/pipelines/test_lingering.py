"""Clients that send slowly, stall, or do not read, at the reward server and the label server."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest
import served_reward
import torch

from mmalign.config import PairsLabelConfig, ServeRewardConfig
from mmalign.data.labels import Labels
from mmalign.pipelines import _label_app, _lingering, _reward_app
from mmalign.pipelines._label_folder import list_groups
from mmalign.pipelines._lingering import Lingering
from mmalign.pipelines._serving import Server

ANSWER = {"prompts": ["p"], "responses": ["an answer"]}


class Gate:
    """A reward of answers that waits where a test wants it to."""

    name = "gate"
    modality = "text"
    differentiable = False
    range = (0.0, 1.0)

    def __init__(self) -> None:
        self.begun, self.open = threading.Event(), threading.Event()

    def __call__(self, samples: list[object], prompts: list[str]) -> torch.Tensor:
        self.begun.set()
        self.open.wait(30)
        return torch.full((len(samples),), 0.25)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


@pytest.fixture(params=["reward", "label"])
def app(request: pytest.FixtureRequest, gate: Gate, folder: Path) -> Iterator[Lingering]:
    if request.param == "reward":
        yield reward_app(gate)
        return
    labels = Labels(folder / "labels.sqlite")
    groups = list_groups(PairsLabelConfig(images=str(folder)))
    assert groups
    labels.add(groups)
    yield _label_app.make_app(labels, folder, token="s3", local_only=True, max_pixels=10**6)
    labels.close()


def reward_app(gate: Gate) -> Lingering:
    config = ServeRewardConfig()
    return _reward_app.make_app(gate, config, token="s3", local_only=True, device="cpu")


@contextmanager
def running(app: Lingering, grace: int = 30) -> Iterator[tuple[Server, int]]:
    lifespan: Literal["on", "off"] = "on" if app_is_reward(app) else "off"
    with served_reward.running(app, lifespan, grace) as found:
        yield found


def app_is_reward(app: Lingering) -> bool:
    return hasattr(app._app, "router")  # a Starlette application, not the guard of the page


def head(length: int, *lines: str, method: str = "POST", path: str = "/") -> bytes:
    first = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {length}"]
    return "\r\n".join([*first, "Content-Type: application/json", *lines, "", ""]).encode()


def connect(port: int, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(data)
    return connection


def read(connection: socket.socket) -> bytes:
    """Read to the end: a connection that is reset raises an error."""
    with connection, connection.makefile("rb") as answer:
        return answer.read()


def test_who_sends_slowly_reads_why_it_was_refused(
    app: Lingering, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_lingering, "IDLE_SECONDS", 2.0)
    part = b"x" * 100_000
    with running(app) as (_, port):
        connection = connect(port, head(13 * len(part)))
        for _ in range(13):  # longer in all than a client may be silent
            connection.sendall(part)
            time.sleep(0.2)
        answer = read(connection)
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert answer.count(b"connection: close") == 1


def test_who_stalls_is_told_at_once_and_left(
    app: Lingering, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_lingering, "IDLE_SECONDS", 0.2)
    with running(app) as (_, port):
        assert read(connect(port, head(100) + b"x")).startswith(b"HTTP/1.1 401 ")


def test_who_sends_for_ever_is_left(app: Lingering) -> None:
    app.seconds = 0.5
    with (
        running(app) as (_, port),
        connect(port, head(10**9)) as connection,
        pytest.raises(OSError, match=r"reset|[Bb]roken pipe"),
    ):
        send_for_ever(connection)


def send_for_ever(connection: socket.socket) -> None:
    for _ in range(1000):
        connection.sendall(b"x")
        time.sleep(0.02)


def test_a_request_that_was_all_there_keeps_its_connection(app: Lingering) -> None:
    with running(app) as (_, port), connect(port, head(1) + b"x") as connection:
        for _ in range(2):
            with http.client.HTTPResponse(connection) as answer:
                answer.begin()
                answer.read()
                assert (answer.status, answer.getheader("connection")) == (401, None)
            connection.sendall(head(1) + b"x")


def test_an_accepted_request_that_stalls_is_cut_off(
    app: Lingering, capsys: pytest.CaptureFixture[str]
) -> None:
    app.seconds = 0.3
    path = "/" if app_is_reward(app) else "/judge"
    with running(app) as (_, port):
        known = head(100, "Authorization: Bearer s3", "X-Mmalign: label", path=path)
        answer = read(connect(port, known + b"{"))
        connect(port, known + b"{").close()  # one that goes away leaves no traceback either
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert answer.endswith(b'{"error":"the rest of the request did not come"}')
    assert capsys.readouterr().err == ""


def test_a_request_that_still_arrives_is_answered_at_the_end(gate: Gate) -> None:
    gate.open.set()
    body = json.dumps(ANSWER).encode()
    with running(reward_app(gate)) as (server, port):
        connection = connect(port, head(len(body), "Authorization: Bearer s3"))
        for place in range(0, len(body), 5):  # longer in all than a silent client is waited for
            connection.sendall(body[place : place + 5])
            time.sleep(0.3)
            server.should_exit = True
        answer = read(connection)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b'{"rewards":[0.25]}')


@pytest.mark.parametrize("forced", [False, True])
def test_what_takes_too_long_is_refused_without_a_traceback(
    gate: Gate, forced: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    body = json.dumps(ANSWER).encode()
    with running(reward_app(gate), grace=1) as (server, port):
        connection = connect(port, head(len(body), "Authorization: Bearer s3") + body)
        assert gate.begun.wait(20)
        server.should_exit = True
        server.force_exit = forced  # as after a second Ctrl+C
        answer = b"" if forced else read(connection)
    connection.close()
    gate.open.set()
    assert forced or answer.startswith(b"HTTP/1.1 503 ")
    assert forced or answer.endswith(b'{"error":"the server is ending"}')
    expected = (
        "" if forced else "ERROR: Cancel 1 running task(s), timeout graceful shutdown exceeded"
    )
    assert " ".join(capsys.readouterr().err.split()) == expected


def _reward_command(folder: Path) -> list[str]:
    return ["serve-reward", "brightness"]


def _label_command(folder: Path) -> list[str]:
    return ["pairs", "label", str(folder)]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command", [_reward_command, _label_command])
def test_stalled_clients_do_not_delay_the_end(
    command: Callable[[Path], list[str]], how: signal.Signals, folder: Path
) -> None:
    reward = command is _reward_command
    arguments = [*command(folder), "--port", "0", "--token", "s3"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mmalign", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline().split("http://")[1].split("/")[0].split(":")[1])
        known = ("Authorization: Bearer s3", "X-Mmalign: label")
        clients = [
            connect(port, head(100) + b"x"),
            connect(port, head(100, *known, path="/" if reward else "/judge") + b"{"),
            connect(port, head(100, *known, method="GET", path="/health" if reward else "/state")),
            connect(port, b"POST / HTTP/1.1\r\nHost: 127"),
            connect(port, b""),
        ]
        if not reward:
            clients.append(_who_does_not_read(port))
        assert clients[0].recv(12) == b"HTTP/1.1 401"
        begun = time.monotonic()
        process.send_signal(how)
        out, err = process.communicate(timeout=60)
        seconds = time.monotonic() - begun
    finally:
        process.kill()
        process.communicate()
    for client in clients:
        client.close()
    assert err == ""
    assert seconds < 10  # about 3 on a quiet machine
    ended = process.returncode == 0
    assert ended or (not reward and process.returncode == -how)
    assert out == "ended\n" if reward else True


def _who_does_not_read(port: int) -> socket.socket:
    """Ask for more than the buffers of both ends take, and read none of it."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", port))
    connection.settimeout(1)
    request = head(0, "Authorization: Bearer s3", method="GET", path="/label.js")
    for _ in range(2000):
        try:
            connection.sendall(request)
        except TimeoutError:
            break
    return connection
