"""A served reward: the local one's scores, batches of several clients, and a good end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from served_reward import GOOD, IMAGES, PROMPTS, Gate, local, png, post, remote, served

from mmalign import endpoint
from mmalign.cli import main
from mmalign.config import RewardConfig
from mmalign.rewards import load_reward
from mmalign.rewards.combine import CombinedReward
from mmalign.scoring import score_samples
from mmalign.types import InputError, Response


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
