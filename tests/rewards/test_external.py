"""Rewards by another process, over HTTP or pipes: bad replies, answers, the documented scorer."""

from __future__ import annotations

import base64
import json
import re
import socket
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from json_server import json_server
from PIL import Image
from scorers import COUNT, IMAGES, PREAMBLE, PROMPTS, command, over_http

from mmalign import endpoint
from mmalign.config import RewardConfig
from mmalign.rewards import load_reward
from mmalign.scoring import score_samples
from mmalign.types import InputError, Response

pytestmark = pytest.mark.usefixtures("no_pauses")

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
        json_server(lambda _: (200, reply.encode())) as running,
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
    with json_server(lambda _: (200, reply)) as running:
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
