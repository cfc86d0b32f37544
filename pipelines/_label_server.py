"""The server of the page on which people choose between images, until it is interrupted."""

from __future__ import annotations

import secrets
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from mmalign.types import InputError

if TYPE_CHECKING:
    import uvicorn

    from mmalign.config import LabelPageConfig
    from mmalign.data.labels import Labels

PROBE = ("192.0.2.1", 9)
"""An address for documentation only: asking the way to it tells this machine's own address."""
LOOK_SECONDS = 0.5
UNDO_SECONDS = 5.0
"""The last answer may still be taken back so long before a page that is complete closes."""


def check_page(config: LabelPageConfig) -> None:
    """Refuse options that would let anybody in.

    Raises:
        InputError: if the token is empty.
    """
    if config.token == "":
        raise InputError("token: must not be empty")


def serve(
    labels: Labels,
    root: Path,
    config: LabelPageConfig,
    *,
    max_pixels: int,
    complete: Callable[[], bool] | None = None,
) -> None:
    """Serve the page and say how much is judged when it ends.

    Args:
        labels: the pairs to judge.
        root: folder of the images.
        config: address and token.
        max_pixels: larger images are not shown.
        complete: whether all answers are there, after which the page closes by itself; it stays
            until it is interrupted when omitted.

    Raises:
        InputError: if the address cannot be listened on.
    """
    import uvicorn

    from mmalign.pipelines._label_app import is_loopback, make_app

    local = is_loopback(config.host)
    token = config.token if config.token or local else secrets.token_urlsafe(16)
    with _listen(config) as listener:
        port = listener.getsockname()[1]
        app = make_app(
            labels,
            root,
            token=token,
            local_only=local,
            max_pixels=max_pixels,
            blind=complete is not None,
        )
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                ws="none",
                lifespan="off",
                timeout_graceful_shutdown=2,
            )
        )
        say(f"label at {_url(config.host, port, token)}  (Ctrl+C ends; judgements are kept)")
        ended = threading.Event()
        if complete is not None:
            threading.Thread(target=_watch, args=(server, complete, ended), daemon=True).start()
        with suppress(KeyboardInterrupt):  # the normal end
            server.run(sockets=[listener])
        ended.set()
    done = labels.progress("")
    say(f"{done.judged} of {done.total} pairs judged by {done.people} people: {labels.file}")


def say(line: str) -> None:
    """Print at once, also into a pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _watch(server: uvicorn.Server, complete: Callable[[], bool], ended: threading.Event) -> None:
    """End the server when all answers have been there for a while."""
    waited = 0.0
    while waited < UNDO_SECONDS:
        if ended.wait(LOOK_SECONDS):
            return
        with suppress(InputError):  # locked just now
            waited = waited + LOOK_SECONDS if complete() else 0.0
    server.should_exit = True


def _listen(config: LabelPageConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise InputError(
            f"cannot listen on {config.host} port {config.port}: {error.strerror or error}; "
            "choose another --host or --port"
        ) from error


def _url(host: str, port: int, token: str | None) -> str:
    shown = _own_address() if host in ("0.0.0.0", "::") else host
    shown = f"[{shown}]" if ":" in shown else shown
    return f"http://{shown}:{port}/" + (f"?token={quote(token, safe='')}" if token else "")


def _own_address() -> str:
    """Find the address under which others reach this machine; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(PROBE)
        except OSError:
            return socket.gethostname()
        return str(probe.getsockname()[0])
