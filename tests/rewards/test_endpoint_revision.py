"""A server is another model tomorrow: only a revision lets a cache keep what it said."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mmalign.chat import ChatEndpoint
from mmalign.config import EndpointConfig, RewardConfig
from mmalign.pipelines._cached import CachedReward
from mmalign.rewards import load_reward
from mmalign.rewards._identity import reward_identity
from mmalign.types import Response

JUDGED = ["judge", "caption_evidence", "yes_no"]
ANSWER = Response(text="A dog on a bench.", fields={"caption": "a dog"})


class Handler(BaseHTTPRequestHandler):
    rating = 0.0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        likely = [{"token": "yes", "logprob": -0.1 / self.rating}, {"token": "no", "logprob": -1.0}]
        choice = {
            "message": {"content": f"Score: {self.rating:g}"},
            "logprobs": {"content": [{"top_logprobs": likely}]},
        }
        body = json.dumps({"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        return


@pytest.fixture
def url() -> Iterator[str]:
    """The address of a model that rates as `Handler.rating` says."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


def scorer(name: str, url: str, folder: Path, **endpoint: Any) -> CachedReward:
    options = {"endpoint": {"url": url, "model_name": "m", "retries": 0, **endpoint}}
    config = RewardConfig(name=name, options=options)
    return CachedReward(load_reward(config, modality="text"), config, str(folder))


def rate(reward: CachedReward, rating: float) -> float:
    Handler.rating = rating
    score = reward([ANSWER], ["What is there?"], ["row 1"])[0]
    reward.save()
    return score


@pytest.mark.parametrize("name", JUDGED)
def test_another_model_behind_the_address_is_asked(name: str, url: str, tmp_path: Path) -> None:
    first = rate(scorer(name, url, tmp_path), 5)
    assert rate(scorer(name, url, tmp_path), 1) < first


@pytest.mark.parametrize("name", JUDGED)
def test_a_revision_keeps_scores(name: str, url: str, tmp_path: Path) -> None:
    first = rate(scorer(name, url, tmp_path, revision="a"), 5)
    assert rate(scorer(name, url, tmp_path, revision="a"), 1) == first
    assert rate(scorer(name, url, tmp_path, revision="b"), 1) < first


def test_labels_need_no_revision() -> None:
    config = RewardConfig(name="yes_no")
    assert reward_identity(config, load_reward(config, modality="text")) is not None


def test_a_revision_asks_again_where_replies_are_kept() -> None:
    options = {"url": "http://127.0.0.1:9/v1", "model_name": "m"}
    names = {
        ChatEndpoint(EndpointConfig(**options, revision=r)).fingerprint for r in (None, "a", "b")
    }
    assert len(names) == 3
