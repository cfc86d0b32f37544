"""Rewards computed by another process: what is sent, and every way in which a reply can be bad."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mmalign import endpoint
from mmalign.config import RewardConfig
from mmalign.rewards import http, load_reward
from mmalign.scoring import score_samples
from mmalign.types import InputError, Response

IMAGES = torch.rand(3, 3, 5, 7, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a red", 'quote " and é', "line\nbreak"]
Answer = Callable[[dict[str, Any]], tuple[int, bytes]]

PREAMBLE = "import json, os, sys, time\nfor line in sys.stdin:\n    request = json.loads(line)\n"
COUNT = "    print(json.dumps({'rewards': [len(p) for p in request['prompts']]}), flush=True)\n"


def command(program: str, **options: Any) -> Any:
    argv = [sys.executable, "-S", "-c", program]
    return load_reward(RewardConfig(name="command", options={"command": argv, **options}))


def count_pixels(request: dict[str, Any]) -> tuple[int, bytes]:
    """Score by the mean gray of each picture, as it arrives."""
    pictures = [Image.open(BytesIO(base64.b64decode(text))) for text in request["images"]]
    return 200, json.dumps({"rewards": [float(np.mean(p)) for p in pictures]}).encode()


@contextmanager
def server(
    answer: Answer, headers: dict[str, str] | None = None, *, threads: bool = False
) -> Iterator[Any]:
    """Run a scorer in a thread; `calls` of what is yielded holds every request.

    `under_way` counts the requests that wait for an answer, one at most without `threads`.
    """
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            running.calls.append(request)
            running.headers.append(dict(self.headers))
            with lock:
                running.under_way += 1
            status, body = answer(request)
            with lock:
                running.under_way -= 1
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *_: object) -> None: ...

    kind = ThreadingHTTPServer if threads else HTTPServer
    running: Any = kind(("127.0.0.1", 0), Handler)
    running.calls, running.headers, running.under_way = [], [], 0
    running.url = f"http://127.0.0.1:{running.server_address[1]}/score"
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield running
    finally:
        running.shutdown()
        running.server_close()


def over_http(url: str, **options: Any) -> Any:
    return load_reward(RewardConfig(name="http", options={"url": url, **options}))


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.0)


def test_http_sends_what_the_protocol_says_in_batches() -> None:
    with server(count_pixels) as running:
        reward = over_http(running.url, batch_size=2, range=[0, 255])
        scores = score_samples(reward, IMAGES, PROMPTS)
    # Requests of several threads come in any order.
    assert sorted(call["prompts"] for call in running.calls) == sorted([PROMPTS[:2], PROMPTS[2:]])
    expected = (IMAGES * 255).round().mean((1, 2, 3))
    torch.testing.assert_close(scores, expected)
    assert (reward.differentiable, reward.range) == (False, (0.0, 255.0))


def test_command_sends_what_the_protocol_says_in_batches(tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = PREAMBLE + f"    open({str(log)!r}, 'a').write(line)\n" + COUNT
    scores = score_samples(command(program, batch_size=2), IMAGES, PROMPTS)
    assert scores.tolist() == [len(prompt) for prompt in PROMPTS]
    requests = [json.loads(line) for line in log.read_text().splitlines()]
    assert [request["prompts"] for request in requests] == [PROMPTS[:2], PROMPTS[2:]]
    picture = Image.open(BytesIO(base64.b64decode(requests[1]["images"][0])))
    assert (picture.format, picture.size) == ("PNG", (7, 5))
    assert np.array_equal(
        np.asarray(picture), (IMAGES[2] * 255).round().permute(1, 2, 0).to(torch.uint8)
    )


BAD_REPLIES = [
    ('{"rewards": [1, 2]}', "returned 2 instead of 3 scores for sample 0 to sample 2"),
    ('{"rewards": [1, null, 2]}', "returned null for sample 1"),
    ('{"rewards": [1, 2, NaN]}', "returned nan for sample 2"),
    ('{"rewards": [1, -Infinity, 2]}', "returned -inf for sample 1"),
    ('{"rewards": [1' + "0" * 400 + ", 1, 2]}", "returned 1000.* for sample 0"),
    ('{"rewards": ["0.5", 1, 2]}', 'returned "0.5" for sample 0'),
    ('{"rewards": [true, 1, 2]}', "returned true for sample 0"),
    ('{"rewards": [[1], 1, 2]}', r"returned \[1\] for sample 0"),
    ('{"rewards": 3}', '"rewards" of its reply is not a list'),
    ('{"scores": [1, 2, 3]}', 'its reply has no "rewards": the keys are scores'),
    ('{"error": "no object found"}', 'its reply has no "rewards": no object found'),
    ("[1, 2, 3]", "its reply is not a JSON object"),
    ("<!doctype html><title>Bad gateway</title>", "its reply is an HTML page, not JSON: '<!doc"),
    ("loading the model", "its reply is something else, not JSON: 'loading the model'"),
    ("[" * 100_000, "its reply is something else, not JSON"),
    ('{"rewards": [1, 2, 3]' + " " * 2**20 + "}", "its reply is longer than 1048576 bytes"),
]


@pytest.mark.parametrize(("reply", "message"), BAD_REPLIES)
def test_bad_replies_over_http(reply: str, message: str) -> None:
    with (
        server(lambda _: (200, reply.encode())) as running,
        pytest.raises(InputError, match=f"^reward http:? {message}"),
    ):
        score_samples(over_http(running.url), IMAGES, PROMPTS)
    assert len(running.calls) == 1


@pytest.mark.parametrize(("reply", "message"), [BAD_REPLIES[i] for i in (0, 1, 2, 5, 12, 13, 15)])
def test_bad_replies_of_a_command(reply: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "reply").write_text(reply + "\n")
    program = PREAMBLE + f"    print(open({str(tmp_path / 'reply')!r}).read(), end='', flush=True)"
    with pytest.raises(InputError, match=f"^reward command:? {message}"):
        score_samples(command(program), IMAGES, PROMPTS)


def test_proxy_is_not_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9/")
    monkeypatch.delenv("no_proxy", raising=False)
    with server(count_pixels) as running:
        assert len(score_samples(over_http(running.url, retries=0), IMAGES, PROMPTS)) == 3


def test_server_errors_are_tried_again() -> None:
    statuses = iter([500, 503, 200])
    with server(lambda r: (next(statuses), count_pixels(r)[1])) as running:
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
        server(lambda _: (status, b"<html>"), headers) as running,
        pytest.raises(InputError, match=message),
    ):
        score_samples(over_http(running.url, retries=2), IMAGES, PROMPTS)
    assert len(running.calls) == attempts


def test_what_a_refusal_says_is_shown() -> None:
    said = json.dumps({"error": "sample 1: not an image\nof an allowed format"}).encode()
    with (
        server(lambda _: (422, said)) as running,
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
    with server(lambda r: (next(answers), count_pixels(r)[1]), {"Retry-After": "7"}) as running:
        assert len(score_samples(over_http(running.url, retries=1), IMAGES, PROMPTS)) == 3
    assert pauses == [7.0] * 6


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint.time, "sleep", lambda _: None)
    monkeypatch.setattr(http, "PATIENCE", 5.0)
    headers = {"Retry-After": "999999999"}  # cut to half a minute, which is longer than that
    with (
        server(lambda _: (503, b'{"error": "full"}'), headers) as running,
        pytest.raises(InputError, match=r"answers 503 .*: full \(2 attempts\)"),
    ):
        score_samples(over_http(running.url, retries=1), IMAGES, PROMPTS)


@pytest.mark.parametrize("value", ["Wed, 21 Oct 2026 07:28:00 GMT", "-5", "soon", ""])
def test_nonsense_in_retry_after_is_an_ordinary_error(value: str) -> None:
    with (
        server(lambda _: (503, b""), {"Retry-After": value}) as running,
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
    with server(answer, threads=True) as running:
        scores = score_samples(over_http(running.url, batch_size=1, concurrency=3), images, prompts)
    assert scores.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert 1 < most[0] <= 3


def test_a_bad_score_of_a_later_request_names_its_sample() -> None:
    def answer(request: dict[str, Any]) -> tuple[int, bytes]:
        bad = request["prompts"] == PROMPTS[2:]
        return 200, json.dumps({"rewards": [None if bad else 1.0]}).encode()

    with (
        server(answer, threads=True) as running,
        pytest.raises(InputError, match="http returned null for sample 2"),
    ):
        score_samples(over_http(running.url, batch_size=1), IMAGES, PROMPTS)


def test_token_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORER_TOKEN", "secret")
    with server(count_pixels) as running:
        score_samples(over_http(running.url, token_env="SCORER_TOKEN"), IMAGES, PROMPTS)
    assert running.headers[0]["Authorization"] == "Bearer secret"
    with pytest.raises(InputError, match=r"token_env: the environment variable NO_SUCH has no key"):
        over_http(running.url, token_env="NO_SUCH")


def answers() -> list[Response]:
    red = Image.new("RGB", (5, 4), "red")
    return [
        Response(text="A cat.", images=(red, red), fields={"image_id": 7}),
        Response(text="é", fields={"objects": ["cat"]}),
    ]


def check_answers_request(request: dict[str, Any]) -> None:
    assert request["prompts"] == ["What?", "Why?"]
    assert request["responses"] == ["A cat.", "é"]
    assert request["fields"] == [{"image_id": 7}, {"objects": ["cat"]}]
    assert [len(images) for images in request["images"]] == [2, 0]
    picture = Image.open(BytesIO(base64.b64decode(request["images"][0][1])))
    assert (picture.size, picture.getpixel((0, 0))) == ((5, 4), (255, 0, 0))


def test_answers_go_over_http() -> None:
    reply = json.dumps({"rewards": [0.5, 1.5]}).encode()
    with server(lambda _: (200, reply)) as running:
        reward = over_text(running.url)
        assert score_samples(reward, answers(), ["What?", "Why?"]).tolist() == [0.5, 1.5]
    check_answers_request(running.calls[0])


def test_answers_go_to_a_command(tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = PREAMBLE + f"    open({str(log)!r}, 'a').write(line)\n" + COUNT
    config = {"command": [sys.executable, "-S", "-c", program], "modality": "text"}
    reward = load_reward(RewardConfig(name="command", options=config), modality="text")
    assert score_samples(reward, answers(), ["What?", "Why?"]).tolist() == [5.0, 4.0]
    check_answers_request(json.loads(log.read_text()))


def over_text(url: str) -> Any:
    options = {"url": url, "modality": "text"}
    return load_reward(RewardConfig(name="http", options=options), modality="text")


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


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("python3 scorer.py", "must be a list"),
        ([], "must be a list"),
        (["no-such-program"], "cannot start no-such-program: No such file"),
    ],
)
def test_command_options_are_checked(argv: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_reward(RewardConfig(name="command", options={"command": argv}))


def test_program_that_died_is_started_again(tmp_path: Path) -> None:
    mark = str(tmp_path / "started before")
    once = f"    if not os.path.exists({mark!r}): open({mark!r}, 'w'); sys.exit(3)\n"
    assert len(score_samples(command(PREAMBLE + once + COUNT), IMAGES, PROMPTS)) == 3


def test_program_that_dies_again_shows_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "starts"
    program = f"open({str(log)!r}, 'a').write('x')\n" + PREAMBLE + "    1 / 0\n"
    with pytest.raises(InputError, match=r"ended with code 1: ZeroDivisionError: [^\n]*$") as error:
        score_samples(command(program), IMAGES, PROMPTS)
    assert "\n" not in str(error.value)
    assert log.read_text() == "xx"


def test_program_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    program = PREAMBLE + (
        "    import subprocess\n"
        "    child = subprocess.Popen(['sleep', '60'])\n"
        f"    open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        "    print('thinking', file=sys.stderr, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with pytest.raises(InputError, match=r"no answer within 2 s: thinking$"):
        score_samples(command(program, timeout=2), IMAGES, PROMPTS)
    child = int((tmp_path / "child").read_text())
    for _ in range(200):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{child}/stat").exists():
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
            if state == "Z":
                return
        time.sleep(0.01)
    pytest.fail("the program's child is still there")


def test_stray_output_is_not_taken_for_a_reply() -> None:
    program = PREAMBLE + COUNT + COUNT
    reward = command(program)
    assert len(score_samples(reward, IMAGES, PROMPTS)) == 3
    time.sleep(0.2)
    with pytest.raises(InputError, match="wrote a line that nobody asked for"):
        score_samples(reward, IMAGES, PROMPTS)


def test_full_pipes_block_neither_side() -> None:
    """A megabyte of complaints before each reply, and a request larger than a pipe."""
    program = PREAMBLE + "    sys.stderr.write('x' * 2**20 + '\\n')\n" + COUNT
    images = torch.rand(1, 3, 256, 256).expand(3, -1, -1, -1)
    assert len(score_samples(command(program), images, PROMPTS)) == 3


def test_program_leaves_with_its_reward() -> None:
    reward = command(PREAMBLE + COUNT)
    score_samples(reward, IMAGES, PROMPTS)
    process = reward._program._process
    del reward
    assert process.wait(10) == 0


DOCUMENT = (Path(__file__).parents[2] / "docs" / "external_rewards.md").read_text("utf-8")


def documented(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)


@pytest.fixture
def tower() -> torch.Tensor:
    """A block on a wide base, one on a base beside it, and nothing."""
    images = torch.ones(3, 3, 32, 32)
    images[:2, :, 8:24, 12:20] = 0.0
    images[0, :, 24:, 6:26] = 0.0
    images[1, :, 24:, 19:22] = 0.0
    return images


def test_documented_program_and_server_agree(
    tower: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, serve = documented("python")
    (tmp_path / "scorer.py").write_text(scorer)
    (tmp_path / "server.py").write_text(serve)
    assert len([line for line in scorer.splitlines() if line.strip()]) <= 25
    (by_command,), (by_http,) = (yaml.safe_load(text)["rewards"] for text in documented("yaml"))
    by_command["options"]["command"][0] = sys.executable
    monkeypatch.chdir(tmp_path)
    scores = score_samples(load_reward(RewardConfig(**by_command)), tower, [""] * 3)
    assert scores[0] > 0.2
    assert scores[1:].tolist() == [0.0, 0.0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.2)
    by_http["options"] |= {"url": f"http://127.0.0.1:{port}/", "retries": 20}
    process = subprocess.Popen([sys.executable, "server.py", str(port)], stderr=subprocess.DEVNULL)
    try:
        remote = score_samples(load_reward(RewardConfig(**by_http)), tower, [""] * 3)
    finally:
        process.kill()
        process.wait()
    torch.testing.assert_close(remote, scores)
