"""The server of the page on which people choose between images, until it is interrupted."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from mmalign.pipelines._listen import listen, say, shown_address
from mmalign.types import InputError

if TYPE_CHECKING:
    from mmalign.config import LabelPageConfig
    from mmalign.data.labels import Labels
    from mmalign.pipelines._serving import Server

GRACE = 5
"""Seconds that requests which are being answered may still take when the server is told to end."""
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
    from mmalign.pipelines._label_app import is_loopback, make_app
    from mmalign.pipelines._serving import Server

    local = is_loopback(config.host)
    token = config.token if config.token or local else secrets.token_urlsafe(16)
    with listen(config.host, config.port) as listener:
        port = listener.getsockname()[1]
        app = make_app(
            labels,
            root,
            token=token,
            local_only=local,
            max_pixels=max_pixels,
            blind=complete is not None,
        )
        server = Server(app, grace=GRACE, lifespan="off")
        say(f"label at {_url(config.host, port, token)}  (Ctrl+C ends; judgements are kept)")
        ended = threading.Event()
        if complete is not None:
            threading.Thread(target=_watch, args=(server, complete, ended), daemon=True).start()
        with suppress(KeyboardInterrupt):  # the normal end
            server.run(sockets=[listener])
        ended.set()
    done = labels.progress("")
    say(f"{done.judged} of {done.total} pairs judged by {done.people} people: {labels.file}")


def _watch(server: Server, complete: Callable[[], bool], ended: threading.Event) -> None:
    """End the server when all answers have been there for a while."""
    waited = 0.0
    while waited < UNDO_SECONDS:
        if ended.wait(LOOK_SECONDS):
            return
        with suppress(InputError):  # locked just now
            waited = waited + LOOK_SECONDS if complete() else 0.0
    server.should_exit = True


def _url(host: str, port: int, token: str | None) -> str:
    return f"{shown_address(host, port)}/" + (f"?token={quote(token, safe='')}" if token else "")
