"""Answers over HTTP: one object at the end, or server-sent events while they are made."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.types import Send

from lascaux.generate.request import Outcome, Request
from lascaux.serve.answers import (
    Answer,
    Json,
    embedding_object,
    join_chunks,
    timings_of,
    usage_of,
)
from lascaux.serve.calls import Call
from lascaux.serve.metrics import Metrics, Watch
from lascaux.serve.refusals import Refusal, encode_json, error_object
from lascaux.serve.served import Served
from lascaux.serve.waiting import Pieces

T = TypeVar("T")
CLIENT_GONE = 499
OBJECTS = {
    "completions": ("cmpl", "text_completion", "text_completion"),
    "chat": ("chatcmpl", "chat.completion", "chat.completion.chunk"),
}


class JsonResponse(Response):
    """An object as JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The bytes of the body."""
        return encode_json(content)


def refusal_response(refusal: Refusal) -> Response:
    """The answer to a request that is not carried out."""
    return JsonResponse(error_object(refusal), refusal.status, dict(refusal.headers))


class EventStream(StreamingResponse):
    """Server-sent events; a client that does not read them for too long is cut off."""

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        *,
        send_seconds: float,
        abort: Callable[[], None],
        free: Callable[[], None],
    ) -> None:
        super().__init__(
            events,
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )
        self._events, self._send_seconds = events, send_seconds
        self._abort, self._free = abort, free

    async def stream_response(self, send: Send) -> None:
        """Send event after event, then the end."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            async with aclosing(self._events) as events:
                async for event in events:
                    message = {"type": "http.response.body", "body": event, "more_body": True}
                    await asyncio.wait_for(send(message), self._send_seconds)
            await asyncio.wait_for(
                send({"type": "http.response.body", "body": b"", "more_body": False}),
                self._send_seconds,
            )
        except TimeoutError:
            self._abort()
        finally:
            self._free()


def event(value: object) -> bytes:
    """One server-sent event."""
    return b"data: " + encode_json(value) + b"\n\n"


async def unless_gone(http: HttpRequest, work: Awaitable[T]) -> T | None:
    """What `work` gives; None, and `work` cancelled, once the client is gone."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def respond(http: HttpRequest, call: Call, served: Served, metrics: Metrics) -> Response:
    """Carry out a call. Raises: Refusal, before anything is sent."""
    pieces = Pieces(served, call.requests, bounded=call.stream)
    head = _head(call, served)
    pieces.submit()
    if call.stream:
        return EventStream(
            stream_events(call, served, pieces, metrics, head),
            send_seconds=served.limits.send_seconds,
            abort=http.scope["abort"],
            free=pieces.cancel,
        )
    try:
        whole = await unless_gone(http, _whole(call, served, pieces, metrics))
    finally:
        pieces.cancel()
    return Response(status_code=CLIENT_GONE) if whole is None else JsonResponse(head | whole)


def _head(call: Call, served: Served) -> Json:
    prefix, whole, chunk = OBJECTS[call.kind]
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": chunk if call.stream else whole,
        "created": int(time.time()),
        "model": served.name,
        "system_fingerprint": None,
        "seed": call.seed,
    }


async def _whole(call: Call, served: Served, pieces: Pieces, metrics: Metrics) -> Json:
    """Everything of a response that is not streamed."""
    watch = Watch(metrics, call.kind)
    answers = [Answer(call, index, served) for index in range(len(call.requests))]
    chunks: list[list[Json]] = [[] for _ in answers]
    async for index, piece in pieces.all():
        watch.saw(index, piece)
        chunk = answers[index].chunk(piece)
        if chunk is not None:
            chunks[index].append(chunk)
    outcomes = [answer.outcome for answer in answers if answer.outcome is not None]
    watch.ended(outcomes)
    return {
        "choices": [join_chunks(call, parts) for parts in chunks],
        "usage": usage_of(call, outcomes),
        "timings": timings_of(outcomes),
    }


async def stream_events(
    call: Call, served: Served, pieces: Pieces, metrics: Metrics, head: Json
) -> AsyncGenerator[bytes]:
    """The events of a stream; a failure after its start is an event as well."""
    watch = Watch(metrics, call.kind)
    answers = [Answer(call, index, served) for index in range(len(call.requests))]
    outcomes: list[Outcome | None] = [None for _ in answers]
    try:
        while not pieces.finished:
            taken = await pieces.take(served.limits.comment_seconds)
            if taken is None:
                yield b": still here\n\n"
                continue
            index, piece = taken
            watch.saw(index, piece)
            chunk = answers[index].chunk(piece)
            outcomes[index] = piece.outcome
            if chunk is None:
                continue
            whole = head | {"choices": [chunk]}
            if pieces.finished:
                whole["timings"] = timings_of([o for o in outcomes if o is not None])
            yield event(whole)
    except Refusal as refusal:
        metrics.failed(refusal.status)
        yield event(error_object(refusal))
    else:
        ended = [outcome for outcome in outcomes if outcome is not None]
        watch.ended(ended)
        if call.include_usage:
            yield event(head | {"choices": [], "usage": usage_of(call, ended)})
    yield b"data: [DONE]\n\n"


async def respond_embeddings(
    http: HttpRequest, requests: list[Request], form: str, served: Served, metrics: Metrics
) -> Response:
    """Carry out a request for embeddings. Raises: Refusal."""
    vectors: list[tuple[float, ...]] = [() for _ in requests]
    outcomes: list[Outcome] = []
    watch = Watch(metrics, "embeddings")

    async def collect(pieces: Pieces) -> list[Json]:
        async for index, piece in pieces.all():
            if piece.embedding is not None:
                vectors[index] = piece.embedding
            if piece.outcome is not None:
                outcomes.append(piece.outcome)
        watch.ended(outcomes)
        return embedding_object(vectors, form)

    pieces = Pieces(served, requests, bounded=False)
    pieces.submit()
    try:
        data = await unless_gone(http, collect(pieces))
    finally:
        pieces.cancel()
    if data is None:
        return Response(status_code=CLIENT_GONE)
    tokens = sum(outcome.prompt_tokens for outcome in outcomes)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JsonResponse({"object": "list", "data": data, "model": served.name, "usage": usage})
