"""Answering clients that are still sending, or that have stopped in the middle of it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

IDLE_SECONDS = 3.0
"""A client that was answered too early is left when it has sent nothing for so long."""
END_SECONDS = 2.0
"""A server that ends waits so long for clients that send nothing, or were refused."""


class Lingering:
    """Lets the rest of a request pass after an answer that did not wait for it.

    A server that answers early and closes resets the connection of a client that is still sending,
    and the client sees a broken pipe where it was told what is wrong. So the answer goes out at
    once, and the connection is closed when the rest has come, of which nothing is kept, or when
    the client has stalled. Who asked first whether to send (`Expect: 100-continue`) is not told to.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        """Serve an application.

        Args:
            app: what answers. It is told that the client has gone where a request comes too slowly.
            seconds: how long a request may take to arrive, and as long again after an answer that
                did not wait for it.
        """
        self._app, self.seconds = app, seconds
        self._ends = math.inf
        self._limits: set[asyncio.Timeout] = set()

    def end(self) -> None:
        """Wait for no client longer than a request under way deserves: the server ends.

        Requests of which nothing comes any more are given up; others may still arrive.
        """
        self._ends = asyncio.get_running_loop().time() + END_SECONDS
        for limit in self._limits:
            when = limit.when()
            if when is not None and when > self._ends and not limit.expired():
                limit.reschedule(self._ends)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        exchange = _Exchange(self, scope, receive, send)
        # Nothing but the end of the server cancels; passed on, uvicorn would print a traceback.
        try:
            if scope["type"] == "http":
                await self._app(scope, exchange.receive, exchange.send)
            else:
                await self._app(scope, receive, send)
        except asyncio.CancelledError:
            if scope["type"] == "http":
                await exchange.cut_off()

    def reading_deadline(self, begun: float) -> float:
        """Return until when to wait for the next part of a request that began then."""
        now = asyncio.get_running_loop().time()
        return min(begun + self.seconds, now + END_SECONDS if self._ends < math.inf else math.inf)

    def lingering_deadline(self) -> float:
        """Return until when to let a request pass that is answered now."""
        return min(asyncio.get_running_loop().time() + self.seconds, self._ends)

    @asynccontextmanager
    async def until(self, when: float) -> AsyncIterator[None]:
        """Wait until then, or less where the server ends.

        Raises:
            TimeoutError: when the time is over.
        """
        async with asyncio.timeout_at(when) as limit:
            self._limits.add(limit)
            try:
                yield
            finally:
                self._limits.discard(limit)


class _Exchange:
    """One request and its answer."""

    def __init__(self, limits: Lingering, scope: Scope, receive: Receive, send: Send) -> None:
        self._limits, self._scope, self._receive, self._send = limits, scope, receive, send
        self._begun = asyncio.get_running_loop().time()
        self._here = False  # the request is complete, or its client has gone
        self._given_up = self._started = self._answered = False

    async def receive(self) -> Message:
        """Give the application the next part of the request."""
        if self._here:
            return await self._receive()
        if not self._given_up:
            with suppress(TimeoutError):
                async with self._limits.until(self._limits.reading_deadline(self._begun)):
                    return await self._next()
        self._given_up = True
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Send a part of the answer; before its end, wait for the end of the request."""
        if message["type"] == "http.response.start":
            await self._take_what_has_come()
            if not self._here:
                message = {**message, "headers": list(message.get("headers", []))}
                MutableHeaders(scope=message)["connection"] = "close"
            self._started = True
        elif not message.get("more_body", False) and not self._here:
            await self._send({**message, "more_body": True})
            self._answered = True
            await self._linger()
            message = _end_of_body()
        await self._send(message)

    async def cut_off(self) -> None:
        """End the answer as well as it can be ended: there is no time left."""
        if self._answered:
            await self._send(_end_of_body())
        elif not self._started:
            answer = JSONResponse({"error": "the server is ending"}, 503, {"connection": "close"})
            await answer(self._scope, self._receive, self._send)

    async def _take_what_has_come(self) -> None:
        # Asking for the body of a client that waits for an answer first would tell it to send.
        if any(name == b"expect" for name, _ in self._scope["headers"]):
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(0):
                while not self._here:
                    await self._next()

    async def _linger(self) -> None:
        with suppress(TimeoutError):
            async with self._limits.until(self._limits.lingering_deadline()):
                while not self._here:
                    async with asyncio.timeout(IDLE_SECONDS):
                        await self._next()

    async def _next(self) -> Message:
        message = await self._receive()
        self._here = not message.get("more_body", False)
        return message


def _end_of_body() -> dict[str, Any]:
    return {"type": "http.response.body", "body": b"", "more_body": False}
