"""Servers of language models: what they are sent, and every way in which a reply can be bad."""

from __future__ import annotations

import base64
import json
import math
import socket
import threading
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from json_server import json_server, says, text_of
from PIL import Image

from mmalign.chat import ChatEndpoint
from mmalign.config import EndpointConfig, GenerationConfig
from mmalign.endpoint import EndpointError
from mmalign.types import ImageRef, InputError, Question

pytestmark = pytest.mark.usefixtures("no_pauses")


def chat(url: str, **options: Any) -> ChatEndpoint:
    return ChatEndpoint(EndpointConfig(**{"url": url, "model_name": "m", "retries": 2, **options}))


def likely(**words: float) -> dict[str, Any]:
    top = [{"token": word, "logprob": math.log(p)} for word, p in words.items()]
    return {"choices": [{"logprobs": {"content": [{"token": "x", "top_logprobs": top}]}}]}


def test_answers_come_in_order_whoever_is_first() -> None:
    late = threading.Event()

    def answer(request: dict[str, Any]) -> tuple[int, Any]:
        if text_of(request) == "0":
            late.wait(5)
        elif text_of(request) == "7":
            late.set()
        return 200, says(f" answer {text_of(request)} ")

    with json_server(answer) as running:
        questions = [Question(str(n)) for n in range(8)]
        answers = chat(running.url, concurrency=8).generate(questions, GenerationConfig())
    assert answers == [f"answer {n}" for n in range(8)]
    assert running.paths[0] == "/v1/chat/completions"


def test_requests_say_how_to_generate_and_show_images(tmp_path: Path) -> None:
    Image.new("RGB", (5, 3), "red").save(tmp_path / "a.jpg")
    Image.new("RGB", (5, 3), "red").save(tmp_path / "a.bmp")
    refs = [ImageRef(tmp_path / name, name) for name in ("a.jpg", "a.bmp")]
    question = Question("What?", (Image.new("RGB", (4, 2), "blue"), *refs))
    config = GenerationConfig(max_new_tokens=9, temperature=0.7, top_p=0.9, seed=3)
    with json_server(lambda request: (200, says("x"))) as running:
        model = chat(running.url, extra={"min_p": 0.1})
        model.generate([question, question], config)
        model.generate([question], config)
    request = running.calls[0]
    assert {k: request[k] for k in ("model", "max_tokens", "temperature", "top_p", "min_p")} == {
        "model": "m",
        "max_tokens": 9,
        "temperature": 0.7,
        "top_p": 0.9,
        "min_p": 0.1,
    }
    urls = [part["image_url"]["url"] for part in request["messages"][0]["content"][:-1]]
    assert [url.partition(";")[0] for url in urls] == [
        "data:image/png",
        "data:image/jpeg",
        "data:image/png",
    ]
    pictures = [Image.open(BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
    assert [picture.size for picture in pictures] == [(4, 2), (5, 3), (5, 3)]
    assert base64.b64decode(urls[1].partition(",")[2]) == (tmp_path / "a.jpg").read_bytes()
    seeds = [call["seed"] for call in running.calls]
    assert len(set(seeds)) == 2  # the same question twice is answered twice, each time alike
    assert seeds.count(seeds[2]) == 2


def test_yes_and_no_are_summed_over_case() -> None:
    chances = {"Yes": 0.5, " yes": 0.2, "No": 0.1, "YES": 0.05, "maybe": 0.1}
    with json_server(lambda request: (200, likely(**chances))) as running:
        ((yes, no),) = chat(running.url).yes_no([Question("Is it?")], 1)
    assert (yes, no) == (pytest.approx(0.75), pytest.approx(0.1))
    assert running.calls[0]["logprobs"] is True
    assert running.calls[0]["max_tokens"] == 1


@pytest.mark.parametrize("status", [429, 503, 408])
def test_busy_servers_are_asked_again(status: int) -> None:
    statuses = iter([status, status, 200])
    with json_server(lambda request: (next(statuses), says("x"))) as running:
        assert chat(running.url).generate([Question("?")], GenerationConfig()) == ["x"]
    assert len(running.calls) == 3


BAD_TEXT = [
    (200, b"<html>", "its reply is an HTML page, not JSON"),
    (200, b"loading", "its reply is not JSON, or was cut off: 'loading'"),
    (200, [], "its reply has no choices"),
    (200, {"choices": []}, "its reply has no choices"),
    (200, {"choices": ["x"]}, "its reply has no choices"),
    (200, {"choices": [{"message": {"content": None}}]}, "its reply has no text"),
    (200, {"choices": [{}]}, "its reply has no text"),
    (404, {"error": {"message": "no model m"}}, "answers 404 .*no model m"),
    (401, b"", "answers 401"),
    (429, b"", r"answers 429 .*\(3 attempts\)"),
]


@pytest.mark.parametrize(("status", "reply", "message"), BAD_TEXT)
def test_bad_replies_name_the_server_and_the_question(
    status: int, reply: Any, message: str
) -> None:
    def answer(request: dict[str, Any]) -> tuple[int, Any]:
        return (status, reply) if text_of(request) == "bad" else (200, says("x"))

    questions = [Question("good"), Question("bad"), Question("good")]
    with (
        json_server(answer) as running,
        pytest.raises(
            EndpointError, match=rf"^endpoint m: {message}|^endpoint m: http.*{message}"
        ) as caught,
    ):
        chat(running.url).generate(questions, GenerationConfig())
    assert caught.value.index == 1
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "reply",
    [
        says("Yes"),
        {"choices": [{"logprobs": None}]},
        {"choices": [{"logprobs": {"content": []}}]},
        {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "Yes"}]}]}}]},
        {"choices": [{"logprobs": {"content": [{"top_logprobs": 3}]}}]},
    ],
)
def test_a_judge_without_probabilities_is_none(reply: Any) -> None:
    with (
        json_server(lambda request: (200, reply)) as running,
        pytest.raises(InputError, match="no top_logprobs"),
    ):
        chat(running.url).yes_no([Question("Is it?")], 1)


def test_probabilities_that_are_no_numbers() -> None:
    body = json.dumps(likely(Yes=0.5)).replace(str(math.log(0.5)), "NaN").encode()
    with (
        json_server(lambda request: (200, body)) as running,
        pytest.raises(InputError, match="logprobs are not numbers"),
    ):
        chat(running.url).yes_no([Question("Is it?")], 1)


def test_server_that_is_down() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(InputError, match=r"^endpoint m: http.* cannot be reached: .*\(3 attempts"):
        chat(url).generate([Question("a"), Question("b")], GenerationConfig())


def test_the_key_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_KEY", "s3cret")
    with json_server(lambda request: (200, says("x"))) as running:
        model = chat(running.url, api_key_env="MODEL_KEY")
        model.generate([Question("?")], GenerationConfig())
    assert running.headers[0]["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in model.fingerprint
    monkeypatch.delenv("MODEL_KEY")
    with pytest.raises(InputError, match="MODEL_KEY has no key"):
        chat(running.url, api_key_env="MODEL_KEY")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": ""}, "url and model_name are required"),
        ({"model_name": ""}, "url and model_name are required"),
        ({"concurrency": 0}, "concurrency"),
        ({"url": "ftp://host"}, "not a plain http"),
        ({"timeout": 0}, "timeout must be positive"),
        ({"retries": -1}, "retries must be at least 0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        chat("http://127.0.0.1:1/v1", **options) if "url" not in options else chat(**options)


def test_beams_are_refused() -> None:
    with pytest.raises(InputError, match="num_beams must be 1"):
        chat("http://127.0.0.1:1/v1").generate([Question("?")], GenerationConfig(num_beams=3))


def test_an_image_is_encoded_once_for_the_questions_about_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved: list[Image.Image] = []
    save = Image.Image.save

    def counted(self: Image.Image, *args: Any, **options: Any) -> None:
        saved.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(Image.Image, "save", counted)
    pictures = [Image.new("RGB", (4, 4), color) for color in ("red", "green", "blue")]
    questions = [Question(f"Is it {n}?", (picture,)) for picture in pictures for n in range(3)]
    with json_server(lambda _: (200, likely(Yes=0.5, No=0.5))) as running:
        chat(running.url, concurrency=1).yes_no(questions, 1)
    assert len(saved) == 3
    urls = [call["messages"][0]["content"][0]["image_url"]["url"] for call in running.calls]
    assert len(set(urls)) == 3
    assert urls == sorted(urls, key=urls.index)
