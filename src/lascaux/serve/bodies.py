"""Receiving a body: not too large, not too slow, and not too many at the same time."""

import asyncio

from starlette.requests import Request as HttpRequest

from lascaux.serve.fields import Body, parse_body
from lascaux.serve.refusals import Refusal
from lascaux.serve.state import RETRY_SECONDS, ServerState

READ_ON_FACTOR = 4
READ_ON_SECONDS = 2.0
CLOSE = {"connection": "close"}


class _Gone(Exception):
    """The client went away before its request was complete."""


async def read_body(http: HttpRequest, state: ServerState) -> Body:
    """The JSON object a client sends.

    Raises: Refusal: 400 for anything else, 408 for a slow one, 413 for a large one, 503 while too
    much is being received.
    """
    received = bytearray()
    try:
        async with asyncio.timeout(state.limits.body_seconds):
            await _receive(http, state, received)
    except TimeoutError:
        raise Refusal(
            f"the body took longer than {state.limits.body_seconds:g} seconds to arrive",
            status=408,
            headers=CLOSE,
        ) from None
    except _Gone:
        raise Refusal("the body is incomplete", headers=CLOSE) from None
    finally:
        state.bodies_bytes -= len(received)
    limits = state.limits
    return await asyncio.to_thread(
        parse_body, bytes(received), limits.body_depth, limits.body_lists
    )


async def _receive(http: HttpRequest, state: ServerState, received: bytearray) -> None:
    most = state.limits.body_bytes
    announced = http.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > most:
        await _refuse_large(http, most, read_on="expect" not in http.headers)
    while True:
        message = await http.receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        part = message.get("body", b"")
        received += part
        state.bodies_bytes += len(part)
        more = message.get("more_body", False)
        if len(received) > most:
            await _refuse_large(http, most, read_on=more)
        if state.bodies_bytes > state.limits.bodies_bytes:
            retry = {"retry-after": RETRY_SECONDS}
            words = "too much is being received at the moment; ask again later"
            raise Refusal(words, status=503, code="busy", headers=CLOSE | retry)
        if not more:
            return


async def _refuse_large(http: HttpRequest, most: int, *, read_on: bool) -> None:
    """Read on for a moment, as a client that still sends would not hear the refusal; raise it."""
    left = READ_ON_FACTOR * most if read_on else 0
    try:
        async with asyncio.timeout(READ_ON_SECONDS):
            while left > 0:
                message = await http.receive()
                left -= len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    break
    except TimeoutError:
        pass
    raise Refusal(
        f"the body has more than {most:,} bytes; send fewer prompts in one request",
        status=413,
        code="body_too_large",
        headers=CLOSE,
    )
