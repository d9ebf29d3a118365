"""A connection of uvicorn's, with what it does not bound: waiting for a request's first lines, and
the number of connections. What is no HTTP is refused in OpenAI's shape.
"""

import asyncio
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from lascaux.serve.limits import ServerLimits
from lascaux.serve.refusals import Refusal, encode_json, error_object


class Connection(H11Protocol):
    """One connection within the limits; applications can cut it by `scope["abort"]()`."""

    def __init__(self, *, limits: ServerLimits, **given: Any) -> None:
        super().__init__(**given)
        self._limits = limits
        self._waiting: asyncio.TimerHandle | None = None
        self._inner = self.app
        self.app = self._answer

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request has arrived."""
        self._stop_waiting()
        scope["abort"] = self.transport.abort
        await self._inner(scope, receive, send)

    def connection_made(self, transport: asyncio.Transport) -> None:
        """A client has connected."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.connections:
            self._refuse(Refusal("too many connections; ask again later", status=503))
        else:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._stop_waiting()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """An answer is written; another request may come."""
        super().on_response_complete()
        self._wait()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP."""
        self._refuse(Refusal("this is not HTTP as the server understands it"))

    def _wait(self) -> None:
        """Give the next request's first lines so long to arrive."""
        self._stop_waiting()
        seconds = self._limits.header_seconds + (self._limits.idle_seconds if self.cycle else 0)
        unsent = self.transport.get_write_buffer_size()
        self._waiting = asyncio.get_running_loop().call_later(seconds, self._look, unsent)

    def _look(self, unsent_before: int) -> None:
        """End the connection, unless the last answer is still on its way to the client."""
        if self.transport.get_write_buffer_size() < unsent_before:
            self._wait()
        else:
            self.transport.abort()

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _refuse(self, refusal: Refusal) -> None:
        body = encode_json(error_object(refusal))
        words = {400: "Bad Request", 503: "Service Unavailable"}[refusal.status]
        head = (
            f"HTTP/1.1 {refusal.status} {words}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode("ascii") + body)
        self.transport.close()
