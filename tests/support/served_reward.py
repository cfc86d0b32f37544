"""A reward behind the server of `mmalign serve-reward`, in a thread of the test's process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from mmalign.config import ServeRewardConfig
from mmalign.pipelines._reward_app import make_app


@contextmanager
def served(
    reward: Any, *, token: str | None = None, local_only: bool = True, **options: Any
) -> Iterator[str]:
    """Serve a reward; gives the address."""
    config = ServeRewardConfig(**options)
    app = make_app(reward, config, token=token, local_only=local_only, device="cpu")
    settings = uvicorn.Config(app, port=0, log_level="warning", lifespan="on")
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(20)
