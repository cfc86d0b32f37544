"""Requests to a served reward: every way in which one can be bad, slow or a stranger's."""

from __future__ import annotations

import base64
import json
import select
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import pytest
import torch
from PIL import Image
from served_reward import GOOD, IMAGES, PROMPTS, Gate, local, png, post, remote, served

from mmalign.pipelines import _reward_app, _reward_request
from mmalign.scoring import score_samples
from mmalign.types import InputError

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
