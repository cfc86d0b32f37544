"""A server that ends within seconds, whatever its clients do."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Literal

import uvicorn

if TYPE_CHECKING:
    from mmalign.pipelines._lingering import Lingering

UNREAD_SECONDS = 2.0
"""A server that ends drops a client that has taken nothing of its answer for so long."""
LOOK_SECONDS = 0.2


class Server(uvicorn.Server):
    """Serves an application; when told to end it waits for its own work, not for stalled clients.

    uvicorn waits for every connection, and then cancels requests with tracebacks.
    """

    def __init__(self, app: Lingering, *, grace: int, lifespan: Literal["on", "off"]) -> None:
        """Prepare to serve.

        Args:
            app: what answers.
            grace: seconds that requests under way may still take when the server is to end.
            lifespan: whether the application is told of its beginning and end.
        """
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                ws="none",
                lifespan=lifespan,
                timeout_graceful_shutdown=grace,
            )
        )
        self._lingering = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what is under way, and end."""
        self._lingering.end()
        watch = asyncio.create_task(self._drop_who_does_not_read())
        try:
            await super().shutdown(sockets)
        finally:
            watch.cancel()
            if self.server_state.connections:
                await asyncio.sleep(LOOK_SECONDS)  # what was cancelled says so
            for connection in tuple(self.server_state.connections):
                connection.transport.abort()
            if self.force_exit:  # by a second Ctrl+C, after which uvicorn tells the app nothing
                await self.lifespan.shutdown()

    async def _drop_who_does_not_read(self) -> None:
        clock = asyncio.get_running_loop().time
        seen: dict[asyncio.Transport, tuple[int, float]] = {}
        while True:
            for connection in tuple(self.server_state.connections):
                transport = connection.transport
                unread = transport.get_write_buffer_size()
                size, since = seen.get(transport, (0, 0.0))
                if unread == 0 or unread != size:
                    seen[transport] = (unread, clock())
                elif clock() - since > UNREAD_SECONDS:
                    transport.abort()
            await asyncio.sleep(LOOK_SECONDS)
