"""A connection of uvicorn's, with what it does not bound: waiting for a request's first lines, and
the number of connections. What is no HTTP is refused in OpenAI's shape.
"""

import asyncio
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState as UvicornState

from lascaux.serve.limits import ServerLimits
from lascaux.serve.refusals import Refusal, encode_json, error_object


def connection_class(limits: ServerLimits) -> type[H11Protocol]:
    """The class of connections within these limits."""

    class Connection(H11Protocol):
        def __init__(
            self,
            config: Config,
            server_state: UvicornState,
            app_state: dict[str, Any],
            _loop: asyncio.AbstractEventLoop | None = None,
        ) -> None:
            super().__init__(config, server_state, app_state, _loop)
            self._waiting: asyncio.TimerHandle | None = None
            inner = self.app

            async def app(scope: Scope, receive: Receive, send: Send) -> None:
                self._stop_waiting()
                scope["abort"] = self.transport.abort
                await inner(scope, receive, send)

            self.app = app

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                self._refuse(Refusal("too many connections; ask again later", status=503))
                return
            self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._wait()

        def send_400_response(self, msg: str) -> None:
            self._refuse(Refusal("this is not HTTP as the server understands it"))

        def _wait(self) -> None:
            """Give the next request's first lines so long to arrive."""
            self._stop_waiting()
            seconds = limits.header_seconds + (limits.idle_seconds if self.cycle else 0)
            unsent = self.transport.get_write_buffer_size()
            loop = asyncio.get_running_loop()
            self._waiting = loop.call_later(seconds, self._look, unsent)

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

    return Connection
