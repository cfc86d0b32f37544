"""A served reward: the local one's scores, and every way in which a request can be bad."""

from __future__ import annotations

import base64
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from served_reward import served

from mmalign import endpoint
from mmalign.cli import main
from mmalign.config import RewardConfig
from mmalign.pipelines import _reward_app, _reward_request
from mmalign.rewards import load_reward
from mmalign.rewards.combine import CombinedReward
from mmalign.scoring import score_samples
from mmalign.types import InputError, Response

IMAGES = torch.randint(0, 256, (5, 3, 12, 9), generator=torch.Generator().manual_seed(0)) / 255
PROMPTS = ["a", "b", "c", "d", "e"]


class Gate:
    """A reward that says how it is called, and waits where a test wants it to."""

    name = "gate"
    modality = "image"
    differentiable = False
    range = (0.0, 1.0)

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.most = 10**9
        self.open = threading.Event()
        self.open.set()

    def __call__(self, samples: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        self.sizes.append(len(samples))
        self.open.wait(20)
        if len(samples) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if "fail" in prompts:
            raise RuntimeError("no such picture")
        return samples.mean((1, 2, 3))


def remote(url: str, modality: Any = "image", **options: Any) -> Any:
    named = {"url": url, "modality": modality, "retries": 0, **options}
    return load_reward(RewardConfig(name="http", options=named), modality=modality)


def local(name: str, modality: Any = "image", **options: Any) -> Any:
    return load_reward(RewardConfig(name=name, options=options), modality=modality)


def png(image: torch.Tensor) -> str:
    buffer = BytesIO()
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def post(url: str, body: Any, **headers: str) -> tuple[int, dict[str, Any], Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {
        "Content-Type": "application/json",
        **{k.replace("_", "-"): v for k, v in headers.items()},
    }
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, sent), timeout=20) as reply:
            return reply.status, json.loads(reply.read()), reply.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read()), error.headers


@pytest.mark.parametrize("name", ["brightness", "jpeg", "clip"])
def test_scores_are_those_of_the_local_reward(name: str) -> None:
    reward = local(name)
    with served(reward) as url:
        scores = score_samples(remote(url, batch_size=5), IMAGES, PROMPTS)
    assert torch.equal(scores, score_samples(reward, IMAGES, PROMPTS).float())


def test_answers_are_scored_as_locally(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text('{"7": ["dog"]}')
    reward = local("chair", "text", labels=str(tmp_path / "labels.json"), coverage=1.0)
    answers = [
        Response(
            text="A dog and a cat.", images=(Image.new("RGB", (4, 4)),), fields={"image_id": 7}
        ),
        Response(text="A bench.", fields={"objects": ["bench", "car"]}),
    ]
    with served(reward) as url:
        scores = score_samples(remote(url, "text"), answers, ["?", "?"])
        assert post(url + "health", b"{}")[0] == 405
    assert scores.tolist() == score_samples(reward, answers, ["?", "?"]).tolist() == [0.5, 0.5]


def test_served_rewards_have_no_gradient() -> None:
    with served(local("brightness")) as url:
        reward = CombinedReward([(remote(url), RewardConfig(name="http"))])
        assert not reward.differentiable
        health = json.loads(urllib.request.urlopen(url + "health", timeout=20).read())
    assert (health["reward"], health["modality"], health["range"]) == (
        "brightness",
        "image",
        [0, 1],
    )
    assert health["differentiable"] is False


def test_waiting_requests_share_a_batch_and_each_gets_its_own_scores() -> None:
    gate = Gate()
    gate.open.clear()
    with served(gate, batch_size=8) as url, ThreadPoolExecutor(6) as pool:
        found = [pool.submit(post, url, {"prompts": ["p"], "images": [png(i)]}) for i in IMAGES]
        other = pool.submit(post, url, {"prompts": ["p"], "images": [png(IMAGES[0, :, :4])]})
        while json.loads(urllib.request.urlopen(url + "health").read())["waiting"] < 6:
            time.sleep(0.01)
        gate.open.set()
        scores = [future.result()[1]["rewards"][0] for future in found]
    assert scores == pytest.approx(IMAGES.mean((1, 2, 3)).tolist(), abs=1e-6)
    assert other.result()[1]["rewards"] == pytest.approx([float(IMAGES[0, :, :4].mean())], abs=1e-6)
    assert sum(gate.sizes) == 6
    assert max(gate.sizes) > 1  # those that came while the first was scored; sizes never mix


def test_one_bad_request_does_not_fail_those_it_shares_a_batch_with() -> None:
    gate = Gate()
    gate.open.clear()
    with served(gate) as url, ThreadPoolExecutor(5) as pool:
        prompts = ["a", "b", "fail", "d", "e"]
        found = [
            pool.submit(post, url, {"prompts": [prompt], "images": [png(image)]})
            for prompt, image in zip(prompts, IMAGES, strict=True)
        ]
        while json.loads(urllib.request.urlopen(url + "health").read())["waiting"] < 5:
            time.sleep(0.01)
        gate.open.set()
        replies = [future.result() for future in found]
    assert [status for status, _, _ in replies] == [200, 200, 422, 200, 200]
    assert "failed for sample 0: RuntimeError: no such picture" in replies[2][1]["error"]


def test_a_full_queue_asks_to_come_back_and_the_client_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate()
    gate.open.clear()
    request = {"prompts": ["p"], "images": [png(IMAGES[0])]}
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        gate.open.set()
        time.sleep(0.05)

    with served(gate, queue=2) as url, ThreadPoolExecutor(2) as pool:
        first = [pool.submit(post, url, request) for _ in range(2)]
        while json.loads(urllib.request.urlopen(url + "health").read())["waiting"] < 2:
            time.sleep(0.01)
        status, content, headers = post(url, request)
        assert (status, headers["Retry-After"]) == (503, "1")
        assert content["error"] == "too many requests are waiting"
        monkeypatch.setattr(endpoint, "time", _Clock(sleep))
        scores = score_samples(remote(url), IMAGES, PROMPTS)
        assert [future.result()[0] for future in first] == [200, 200]
    assert set(waits) == {1.0}
    torch.testing.assert_close(scores, IMAGES.mean((1, 2, 3)))


class _Clock:
    """The module `time` with another sleep."""

    def __init__(self, sleep: Any) -> None:
        self.sleep, self.monotonic = sleep, time.monotonic


def test_out_of_memory_halves_the_servers_batch(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    gate.most = 2
    with served(gate) as url:
        scores = score_samples(remote(url), IMAGES, PROMPTS)
    torch.testing.assert_close(scores, IMAGES.mean((1, 2, 3)))
    assert gate.sizes == [5, 2, 2, 1]
    assert "reward gate: out of memory with 5 samples at a time; going on with 2" in caplog.text


def test_a_bad_score_names_the_sample_to_the_client() -> None:
    reward = load_reward(RewardConfig(name=f"{__name__}:nan_for_b"))
    with (
        served(reward) as url,
        pytest.raises(InputError, match=r"^reward http: .* 422 .*returned nan for sample 1$"),
    ):
        score_samples(remote(url), IMAGES, PROMPTS)


def nan_for_b(images: torch.Tensor, prompts: list[str]) -> list[float]:
    return [float("nan") if prompt == "b" else 1.0 for prompt in prompts]


GOOD = {"prompts": ["p"], "images": [png(IMAGES[0])]}
BAD_REQUESTS: list[tuple[Any, int, str]] = [
    (b"<html>", 422, "the request is not JSON"),
    (b"[" * 100_000, 422, "the request is not JSON"),
    (b"\x80\x04N.", 422, "the request is not JSON"),
    ([1], 422, "not a JSON object"),
    ({"images": []}, 422, '"prompts" of the request is not a list of texts'),
    ({**GOOD, "prompts": "p"}, 422, '"prompts" of the request is not a list of texts'),
    ({**GOOD, "prompts": []}, 422, "0 samples: send 1 to 3 at a time"),
    ({"prompts": ["p"] * 4, "images": []}, 422, "4 samples: send 1 to 3 at a time"),
    ({"prompts": ["p", "q"], "images": GOOD["images"]}, 422, "1 samples for 2 prompts"),
    ({**GOOD, "images": ["?"]}, 422, "sample 0: the image is not base64"),
    ({**GOOD, "images": ["AAAA"]}, 422, "sample 0: not an image of an allowed format"),
    ({**GOOD, "images": [png(torch.zeros(3, 40, 40))]}, 422, "sample 0: the image has 40 x 40"),
    ({**GOOD, "responses": ["x"]}, 422, "this reward scores images, not answers"),
    ({**GOOD, "more": "x" * 2**20}, 413, "more than 1048576 bytes"),
]


@pytest.mark.parametrize(("body", "status", "message"), BAD_REQUESTS)
def test_bad_requests(body: Any, status: int, message: str) -> None:
    gate = Gate()
    with served(gate, max_body_mib=1, max_pixels=1000, max_samples=3) as url:
        code, content, _ = post(url, body)
        assert (code, message in content["error"]) == (status, True), content
        assert gate.sizes == []
        assert post(url, GOOD)[0] == 200


@pytest.mark.parametrize("modality", ["image", "text"])
def test_pixels_of_a_request_are_counted_before_any_is_decoded(
    modality: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few bytes can be the header of any size: three of one image's size are too much here."""

    def refuse(*args: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(_reward_request, "decode", refuse)
    buffer = BytesIO()
    Image.new("1", (2000, 2000)).save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    request: dict[str, Any] = {"prompts": ["p"] * 3, "images": [image] * 3}
    if modality == "text":
        request = {"prompts": ["p"], "responses": ["a"], "images": [[image] * 3]}
    reward = Gate() if modality == "image" else local("length", "text")
    with served(reward, max_pixels=4_000_000, max_total_pixels=11_999_999) as url:
        status, content, _ = post(url, request)
    assert status == 422
    assert content["error"] == (
        "the images have 12000000 pixels together, more than max_total_pixels 11999999: "
        "send fewer at a time"
    )


def test_decoded_pixels_are_bounded_over_all_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, decoded = Gate(), []
    gate.open.clear()
    decode = _reward_request.decode

    def count(ref: Any, max_pixels: int) -> Image.Image:
        decoded.append(ref)
        return decode(ref, max_pixels)

    monkeypatch.setattr(_reward_request, "decode", count)
    with served(gate, max_total_pixels=2 * 12 * 9) as url, ThreadPoolExecutor(5) as pool:
        found = [pool.submit(post, url, {"prompts": ["p"], "images": [png(i)]}) for i in IMAGES]
        while json.loads(urllib.request.urlopen(url + "health").read())["waiting"] < 5:
            time.sleep(0.01)
        while not gate.sizes or len(decoded) < 2:
            time.sleep(0.01)
        time.sleep(0.3)
        assert len(decoded) == 2
        gate.open.set()
        scores = [future.result()[1]["rewards"][0] for future in found]
    assert scores == pytest.approx(IMAGES.mean((1, 2, 3)).tolist(), abs=1e-6)
    assert len(decoded) == 5


BAD_ANSWERS: list[tuple[dict[str, Any], str]] = [
    ({"responses": [1]}, '"responses" of the request is not a list of texts'),
    ({"responses": ["a"], "images": ["x"]}, '"images" of the request is not a list of lists'),
    ({"responses": ["a"], "images": [[1]]}, "sample 0: its images are not texts in base64"),
    ({"responses": ["a"], "images": [["AAAA"]]}, "sample 0: not an image"),
    ({"responses": ["a"], "fields": [[]]}, '"fields" of the request is not a list of objects'),
    ({"responses": ["a", "b"], "fields": [{}]}, "2 responses, 2 images, 1 fields"),
]


@pytest.mark.parametrize(("body", "message"), BAD_ANSWERS)
def test_bad_requests_of_answers(body: dict[str, Any], message: str) -> None:
    with served(local("length", "text")) as url:
        code, content, _ = post(url, {"prompts": ["p"], **body})
    assert (code, message in content["error"]) == (422, True), content


@contextmanager
def sending(url: str, length: int, **headers: str) -> Iterator[socket.socket]:
    """Connect, and send the head of a request with other headers than a good one's."""
    host, port = url.split("/")[2].split(":")
    lines = {"Host": host, "Content-Type": "application/json", "Content-Length": str(length)}
    lines.update({k.replace("_", "-"): v for k, v in headers.items()}, Connection="close")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        connection.sendall(f"POST / HTTP/1.1\r\n{head}\r\n".encode())
        yield connection


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer secret"}, 413),
        ({"Authorization": "Bearer secret", "Content_Type": "text/plain"}, 415),
        ({"Host": "example.org"}, 403),
        ({}, 401),
    ],
)
def test_a_refusal_reaches_who_is_still_sending(headers: dict[str, str], status: int) -> None:
    """A connection closed early would be reset, and hide the answer."""
    body = b"x" * (2 * 2**20)
    with (
        served(Gate(), token="secret", max_body_mib=1) as url,
        sending(url, len(body), **headers) as connection,
    ):
        connection.sendall(body[:1000])
        readable, _, _ = select.select([connection], [], [], 20)
        assert readable  # the answer does not wait for the rest, but the connection does
        connection.sendall(body[1000:])
        with connection.makefile("rb") as answer:
            assert answer.read().startswith(f"HTTP/1.1 {status} ".encode())


def test_who_asks_whether_to_send_is_told_no_at_once() -> None:
    with (
        served(Gate(), max_body_mib=1) as url,
        sending(url, 2 * 2**20, Expect="100-continue") as connection,
    ):
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_never_ends_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_reward_app, "BODY_SECONDS", 0.2)
    with served(Gate()) as url, sending(url, 100) as connection:
        connection.sendall(b"{")
        assert b" 408 " in connection.recv(1000)


def test_who_has_no_token_learns_nothing() -> None:
    gate = Gate()
    with served(gate, token="secret", local_only=False) as url:
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Basic secret"}):
            assert post(url, GOOD, **headers)[0] == 401
        assert post(url, GOOD, Authorization="Bearer secret")[0] == 200
        with pytest.raises(InputError, match=r"answers 401 .*a token is needed: set token_env"):
            score_samples(remote(url), IMAGES, PROMPTS)
    assert gate.sizes == [1]


def test_web_sites_cannot_ask() -> None:
    """Forms and scripts of another site cannot send JSON, nor give this machine their name."""
    gate = Gate()
    with served(gate) as url:
        assert post(url, GOOD, Content_Type="text/plain")[0] == 415
        assert post(url, GOOD, Host="example.org")[0] == 403
        assert post(url, GOOD, Host="localhost:80")[0] == 200
    assert gate.sizes == [1]


def test_termination_answers_what_is_under_way(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\n"
        "def score(images, prompts):\n"
        "    open('begun', 'w').close()\n"
        "    time.sleep(1)\n"
        "    return [0.25] * len(images)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "mmalign", "serve-reward", "slow:score", "--port", "0"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = line.partition(" at ")[2].split()[0]
        with ThreadPoolExecutor(1) as pool:
            reply = pool.submit(post, url, GOOD)
            while not (tmp_path / "begun").exists():
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            assert reply.result()[:2] == (200, {"rewards": [0.25]})
        assert process.wait(30) == 0
        assert process.stdout.read() == "ended\n"
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clipp"], "unknown reward 'clipp': did you mean 'clip'"),
        ([], "name one"),
        (["brightness", "--port", "70000"], "port"),
        (["brightness", "--max_total_pixels", "0"], "max_total_pixels: must be at least 1"),
        (["brightness", "--queue", "0"], "queue: must be at least 1"),
        (["brightness", "--options", '{"x": 1}'], "it takes: none"),
    ],
)
def test_options_are_checked(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve-reward", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with served(Gate()) as url:
        port = url.rstrip("/").rpartition(":")[2]
        assert main(["serve-reward", "brightness", "--port", port]) == 2
    assert "choose another --host or --port" in capsys.readouterr().err
