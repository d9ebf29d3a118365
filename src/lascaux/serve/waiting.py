"""From the engine's thread to the event loop: the pieces of a request's answers as they come.

Whatever ends the wait, a client that went away, a time limit, an error, frees the answers at once.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence

from lascaux.errors import RequestError
from lascaux.generate.request import Piece, QueueFull, Request
from lascaux.serve.refusals import Refusal
from lascaux.serve.served import Served

FULL_RETRY_SECONDS = 2


class Pieces:
    """The pieces of several answers in the order in which they come.

    Whoever submits cancels in the end, however it ends. If `bounded`, answers end when too many of
    their pieces wait to be taken.
    """

    def __init__(self, served: Served, requests: Sequence[Request], *, bounded: bool) -> None:
        self._served, self._requests = served, requests
        self._most_waiting = served.limits.backlog_pieces if bounded else None
        self._loop = asyncio.get_running_loop()
        self._ends_at = self._loop.time() + served.limits.request_seconds
        self._arrived: deque[tuple[int, Piece]] = deque()
        self._changed = asyncio.Event()
        self._tickets: list[int] = []
        self._running = len(requests)
        self._too_slow = False

    def submit(self) -> None:
        """Hand the requests to the engine. Raises: Refusal: 400 if it refuses, 429 if full."""
        asked = [
            (request, lambda piece, i=index: self._hand_over(i, piece))
            for index, request in enumerate(self._requests)
        ]
        try:
            self._tickets = self._served.engine.submit(asked)
        except QueueFull as error:
            retry = {"retry-after": str(FULL_RETRY_SECONDS)}
            raise Refusal(str(error), status=429, code="queue_full", headers=retry) from None
        except RequestError as error:
            raise Refusal(str(error)) from None

    def cancel(self) -> None:
        """Free what still runs."""
        if self._running:
            self._served.engine.cancel(self._tickets)

    def _hand_over(self, index: int, piece: Piece) -> None:
        """Called in the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._arrive, index, piece)
        except RuntimeError:  # the loop has ended, and whoever waited with it
            return

    def _arrive(self, index: int, piece: Piece) -> None:
        self._running -= piece.outcome is not None
        if self._most_waiting is not None and len(self._arrived) >= self._most_waiting:
            self._too_slow = True
            self.cancel()
        else:
            self._arrived.append((index, piece))
        self._changed.set()

    @property
    def finished(self) -> bool:
        """Whether every answer has ended and every piece was taken."""
        return not (self._running or self._arrived)

    async def take(self, seconds: float | None = None) -> tuple[int, Piece] | None:
        """The next piece with the index of its answer; None after so many silent seconds.

        Raises: Refusal: 503 when the server stops, 504 after the time limit, 500 for an answer that
        failed, 408 if pieces were not taken fast enough.
        """
        while not self._arrived or self._too_slow:
            if self._too_slow:
                raise Refusal("the stream was not read fast enough", status=408)
            left = self._ends_at - self._loop.time()
            if left <= 0:
                raise Refusal(
                    f"the request took longer than {self._served.limits.request_seconds:g} seconds",
                    status=504,
                    code="timeout",
                )
            self._changed.clear()
            wait = left if seconds is None else min(left, seconds)
            try:
                await asyncio.wait_for(self._changed.wait(), wait)
            except TimeoutError:
                if seconds is not None and seconds < left:
                    return None
        index, piece = self._arrived.popleft()
        outcome = piece.outcome
        if outcome is not None and outcome.finish_reason == "cancelled":
            raise Refusal("the server is shutting down", status=503, code="shutting_down")
        if outcome is not None and outcome.finish_reason == "error":
            raise Refusal(outcome.error or "internal error", status=500, code="internal_error")
        return index, piece

    async def all(self) -> AsyncIterator[tuple[int, Piece]]:
        """Every piece, to the end."""
        while not self.finished:
            taken = await self.take()
            if taken is not None:
                yield taken
