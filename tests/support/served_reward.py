"""The servers of mmalign in a thread of the test's process, run as its commands run them."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any, Literal

import torch
from PIL import Image

from mmalign.config import RewardConfig, ServeRewardConfig
from mmalign.pipelines._lingering import Lingering
from mmalign.pipelines._reward_app import make_app
from mmalign.pipelines._serving import Server
from mmalign.rewards import load_reward

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


@contextmanager
def running(
    app: Lingering, lifespan: Literal["on", "off"], grace: int = 30
) -> Iterator[tuple[Server, int]]:
    """Run an application; gives its server and the port, and ends it."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(app, grace=grace, lifespan=lifespan)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server, listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@contextmanager
def served(
    reward: Any, *, token: str | None = None, local_only: bool = True, **options: Any
) -> Iterator[str]:
    """Serve a reward; gives the address."""
    config = ServeRewardConfig(**options)
    app = make_app(reward, config, token=token, local_only=local_only, device="cpu")
    with running(app, "on") as (_, port):
        yield f"http://127.0.0.1:{port}/"


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


GOOD = {"prompts": ["p"], "images": [png(IMAGES[0])]}
