"""Answering a client that is still sending."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Lingering:
    """Lets the rest of a request pass before an answer that did not wait for it.

    A server that answers early and closes resets the connection of a client that is still sending,
    and the client sees a broken pipe where it was told what is wrong. Nothing of the rest is kept.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        """Serve an application.

        Args:
            app: what answers.
            seconds: how long after its beginning a request is waited for.
        """
        self.app, self.seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        deadline = asyncio.get_running_loop().time() + self.seconds
        # Who asks first whether to send (Expect: 100-continue) does not send when told no.
        here = any(name == b"expect" for name, _ in scope["headers"])

        async def watched_receive() -> Message:
            nonlocal here
            message = await receive()
            here = not message.get("more_body", False)  # a client that has gone sends no more
            return message

        async def late_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(deadline):
                        while not here:
                            await watched_receive()
            await send(message)

        await self.app(scope, watched_receive, late_send)
