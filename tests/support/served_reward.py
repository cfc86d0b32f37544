"""The servers of mmalign in a thread of the test's process, run as its commands run them."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from mmalign.config import ServeRewardConfig
from mmalign.pipelines._lingering import Lingering
from mmalign.pipelines._reward_app import make_app
from mmalign.pipelines._serving import Server


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
