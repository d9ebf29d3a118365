"""Many answers at once: prompts are read in chunks, and every answer gets a token in each step.

    submitted ─▶ waiting ─▶ reading its prompt, a chunk a step ─▶ drawing, a row a step ─▶ ended

An answer is admitted when a slot is free and pages for its longest possible end are: nothing that
runs is ever put back. Its text depends on the request alone: draws are keyed by seed, choice and
place, and what a row computes does not depend on the rows beside it where compiled code computes
rows (`native.py`); elsewhere it does so up to rounding.
"""

import atexit
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from lascaux.errors import CheckpointError, LascauxError, RequestError
from lascaux.generate.answer import Answer, Deliver
from lascaux.generate.load import LoadedModel
from lascaux.generate.network import PagedNetwork
from lascaux.generate.pages import PAGE_TOKENS, Row, count_pages, page_keys
from lascaux.generate.request import (
    EngineFigures,
    EngineOptions,
    FinishReason,
    Piece,
    QueueFull,
    Request,
)
from lascaux.generate.sampling import check_finite, check_sampling
from lascaux.parallel.hardware import free_bytes

LogitRows = NDArray[np.float32]
IDLE_SECONDS = 0.1


class Engine:
    """A loaded model that answers requests; one thread computes, any may submit and cancel."""

    def __init__(self, loaded: LoadedModel, options: EngineOptions | None = None) -> None:
        self.loaded, self.options = loaded, options or EngineOptions()
        self.max_context = loaded.model.config.max_context
        vocab_size, rows = loaded.tokenizer.vocab_size, loaded.model.config.vocab_size
        if vocab_size > rows:
            raise CheckpointError(
                f"tokenizer and model do not belong together: the tokenizer has {vocab_size} ids, "
                f"model.vocab_size is {rows}"
            )
        self._vocab_size = vocab_size
        element_bytes = next(loaded.model.final_norm.parameters()).element_size()
        free = free_bytes(loaded.device)
        pages = count_pages(loaded.model.config, self.options, element_bytes, free)
        self._network = PagedNetwork(loaded.model, pages, vocab_size, loaded.native)
        self._changed = threading.Condition()
        self._submitted: deque[Answer] = deque()
        self._cancelled: set[int] = set()
        self._waiting: deque[Answer] = deque()
        self._active: list[Answer] = []
        self._tickets = self._steps = self._rows = 0
        self._totals: Counter[str] = Counter()
        self._finished: Counter[FinishReason] = Counter()
        self._accepts, self._ends_at = True, math.inf
        self._thread: threading.Thread | None = None

    def submit(self, asked: Sequence[tuple[Request, Deliver]]) -> list[int]:
        """Queue all or none of the requests; returns a ticket for each.

        Every piece of an answer is handed to the function beside its request, in the thread that
        computes; the last piece has an outcome.

        Raises: RequestError naming the field, what it was and what is allowed; QueueFull.
        """
        made = [self._make(request, deliver) for request, deliver in asked]
        most = self.options.max_streams + self.options.max_waiting
        if len(asked) > most:
            raise RequestError(
                f"{len(asked)} answers are asked for at once; at most {most} can be computed or "
                "wait; ask for fewer"
            )
        with self._changed:
            if not self._accepts:
                raise QueueFull("the server is shutting down; ask another one")
            here = len(self._submitted) + len(self._waiting) + len(self._active)
            if here + len(asked) > most:
                raise QueueFull(
                    f"{here} answers are being computed or wait, and {len(asked)} more are asked "
                    f"for; at most {self.options.max_streams} are computed and "
                    f"{self.options.max_waiting} wait; ask again later"
                )
            for answer in made:
                self._tickets += 1
                answer.ticket = self._tickets
            self._submitted.extend(made)
            self._changed.notify()
        return [answer.ticket for answer in made]

    def _make(self, request: Request, deliver: Deliver) -> Answer:
        return Answer(
            request,
            deliver,
            tokenizer=self.loaded.tokenizer,
            roles=self.loaded.roles,
            most_tokens=self._check(request),
            draft_tokens=self.options.draft_tokens,
        )

    def cancel(self, tickets: Iterable[int]) -> None:
        """End these answers before the next step and free what they hold; ended ones stay ended."""
        with self._changed:
            self._cancelled.update(tickets)
            self._changed.notify()

    def run(self, request: Request) -> Iterator[Piece]:
        """The pieces of one answer, computed as they are read; not beside `start`.

        Raises: RequestError at once; the request is submitted when the first piece is read.
        """
        self._check(request)
        return self._run(request)

    def _run(self, request: Request) -> Iterator[Piece]:
        pieces: deque[Piece] = deque()
        tickets = self.submit([(request, pieces.append)])
        try:
            while True:
                while pieces:
                    piece = pieces.popleft()
                    yield piece
                    if piece.outcome is not None:
                        return
                self.step()
        finally:
            self.cancel(tickets)
            self._take_messages()

    def start(self) -> None:
        """Compute in a thread of its own from now on, until `stop`, or the end of the program."""
        assert self._thread is None, "the engine runs already"
        atexit.register(self.stop, 0.0)
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def stop(self, drain_seconds: float) -> None:
        """Take nothing on any more, finish within so many seconds, cancel the rest."""
        with self._changed:
            self._accepts, self._ends_at = False, time.monotonic() + drain_seconds
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
            atexit.unregister(self.stop)

    def figures(self) -> EngineFigures:
        """The figures at this moment."""
        pool, totals = self._network.pool, self._totals
        with self._changed:
            return EngineFigures(
                running=len(self._active),
                waiting=len(self._waiting) + len(self._submitted),
                cache_pages=pool.num_pages,
                cache_pages_used=pool.num_held,
                cache_bytes=pool.num_bytes,
                weight_bytes=self.loaded.weight_bytes,
                steps=self._steps,
                rows=self._rows,
                prompt_tokens=totals["prompt"],
                cached_tokens=totals["cached"],
                drawn_tokens=totals["drawn"],
                drafted_tokens=totals["drafted"],
                accepted_tokens=totals["accepted"],
                finished=dict(self._finished),
            )

    def step(self) -> bool:
        """A chunk of one prompt and a token of every answer that draws; False if there are none."""
        self._take_messages()
        self._admit()
        reading = next((answer for answer in self._active if answer.reads), None)
        if reading is not None:
            self._guard([reading], lambda: self._read(reading))
        drawing = [answer for answer in self._active if not answer.reads]
        if drawing:
            self._guard(drawing, lambda: self._draw(drawing))
        return bool(self._active or self._waiting)

    def _check(self, request: Request) -> int:
        """Raise RequestError for what cannot be done; how many tokens may be drawn."""
        check_sampling(request.sampling, self._vocab_size)
        length, asked = len(request.prompt), request.sampling.max_tokens
        draws = not request.embed and asked != 0
        most = self.max_context - draws
        if not 1 <= length <= most:
            raise RequestError(
                f"'prompt' has {length} tokens; model.max_context is {self.max_context}, so that 1 "
                f"to {most} {'leave room for an answer' if draws else 'can be read'}; shorten it"
                if length
                else "'prompt' is empty; give at least one token"
            )
        bad = next((t for t in request.prompt if not 0 <= t < self._vocab_size), None)
        if bad is not None:
            raise RequestError(
                f"'prompt' has token id {bad}; the model has ids from 0 to {self._vocab_size - 1}"
            )
        if request.top_logprobs is not None and not 0 <= request.top_logprobs <= self._vocab_size:
            raise RequestError(
                f"'logprobs' must be from 0 to {self._vocab_size}; got {request.top_logprobs}"
            )
        if request.score_prompt and request.embed:
            raise RequestError("a prompt is scored or embedded; ask for one of them")
        if request.score_prompt and request.top_logprobs is None:
            raise RequestError("a scored prompt needs 'logprobs', the number of alternatives")
        room = self.max_context - length
        most_tokens = 0 if not draws else room if asked is None else min(asked, room)
        pages = self._pages_for(length, most_tokens)
        if pages > self._network.pool.num_pages:
            raise RequestError(
                f"prompt and answer may take {length + most_tokens} tokens; the cache holds "
                f"{self._network.pool.num_pages * PAGE_TOKENS} (serve.cache_tokens); ask for fewer"
            )
        return most_tokens

    @staticmethod
    def _pages_for(prompt_length: int, most_tokens: int) -> int:
        """Pages for all but the last token, which nothing looks at."""
        return math.ceil((prompt_length + max(0, most_tokens - 1)) / PAGE_TOKENS)

    def _take_messages(self) -> None:
        """Take over what other threads submitted and cancelled."""
        with self._changed:
            self._waiting.extend(self._submitted)
            self._submitted.clear()
            cancelled, self._cancelled = self._cancelled, set()
        if cancelled:
            for answer in [*self._active, *self._waiting]:
                if answer.ticket in cancelled:
                    self._end(answer, "cancelled")

    def _admit(self) -> None:
        """Begin waiting answers, in order, as slots and pages allow."""
        pool = self._network.pool
        while self._waiting and len(self._active) < self.options.max_streams:
            answer = self._waiting[0]
            if self.options.reuse_prefixes and not answer.keys:
                answer.keys = page_keys(answer.request.prompt)
            found = self._find_pages(answer)
            needed = self._pages_for(answer.prompt_length, answer.most_tokens) - len(found)
            if needed > pool.num_available:
                pool.give_back(found)
                return
            answer.admit([*found, *pool.take(needed)], len(found) * PAGE_TOKENS)
            self._totals["cached"] += answer.cached_tokens
            self._waiting.popleft()
            self._active.append(answer)

    def _read(self, answer: Answer) -> None:
        """Compute the next chunk of a prompt; after its last one the first token is drawn."""
        self._take_over(answer)
        start, length = answer.computed, answer.prompt_length
        end = min(length, start + self._network.chunk_tokens)
        x = self._network.read(answer.tokens[start:end], start, answer.table)
        answer.computed = end
        self._totals["prompt"] += end - start
        for page in range(start // PAGE_TOKENS, min(end // PAGE_TOKENS, len(answer.keys))):
            self._network.pool.keep(answer.table[page], answer.keys[page])
        if answer.request.embed:
            total = self._network.outputs(x).sum(0)
            check_finite(total.cpu().numpy())
            answer.embedding = total if answer.embedding is None else answer.embedding + total
        elif answer.request.score_prompt:
            logits = self._network.logits(x)
            answer.score_prompt(logits, start)
        if end < length:
            return
        if answer.most_tokens == 0:
            self._end(answer, "length")
            return
        answer.draw(self._network.logits(x[-1:])[0])
        self._totals["drawn"] += 1
        self._hand_over(answer)

    def _find_pages(self, answer: Answer) -> list[int]:
        """The kept pages that continue what is computed of a prompt, now held.

        None where the outputs of all tokens are wanted.
        """
        request, found = answer.request, list[int]()
        if request.score_prompt or request.embed:
            return found
        first = answer.computed // PAGE_TOKENS
        while True:
            page = self._network.pool.find(request.prompt, answer.keys, first + len(found))
            if page is None:
                return found
            found.append(page)

    def _take_over(self, answer: Answer) -> None:
        """Use the pages that another prompt has computed since this one was admitted."""
        for page in self._find_pages(answer):
            number = answer.computed // PAGE_TOKENS
            self._network.pool.give_back([answer.table[number]])
            answer.table[number] = page
            answer.computed += PAGE_TOKENS
            answer.cached_tokens += PAGE_TOKENS
            self._totals["cached"] += PAGE_TOKENS

    def _draw(self, drawing: Sequence[Answer]) -> None:
        """A token for each answer, and more where guesses turn out right."""
        guesses = [answer.guess() for answer in drawing]
        rows = [
            Row(token, answer.computed + number, answer.table)
            for answer, guess in zip(drawing, guesses, strict=True)
            for number, token in enumerate([answer.tokens[-1], *guess])
        ]
        logits = self._network.decode(rows)
        self._steps += 1
        self._rows += len(rows)
        first = 0
        for answer, guess in zip(drawing, guesses, strict=True):
            own = logits[first : first + 1 + len(guess)]
            first += len(own)
            self._guard([answer], lambda a=answer, g=guess, o=own: self._accept(a, g, o))

    def _accept(self, answer: Answer, guess: Sequence[int], logits: LogitRows) -> None:
        """Draw from each row in turn, as long as the next one was computed for what was drawn."""
        accepted = 0
        for number, row in enumerate(logits):
            token = answer.draw(row)
            answer.computed += 1
            self._totals["drawn"] += 1
            if answer.finish_reason is not None:
                break
            if number == len(guess) or token != guess[number]:
                break
            accepted += 1
        answer.count_guesses(len(guess), accepted)
        self._totals["drafted"] += len(guess)
        self._totals["accepted"] += accepted
        self._hand_over(answer)

    def _hand_over(self, answer: Answer) -> None:
        if answer.finish_reason is not None:
            self._end(answer, answer.finish_reason)
            return
        answer.hand_over()
        if answer.undeliverable:
            self._end(answer, "cancelled")

    def _end(self, answer: Answer, reason: FinishReason, error: str | None = None) -> None:
        """Free what the answer holds, then deliver its last piece."""
        if answer in self._active:
            self._active.remove(answer)
        else:
            self._waiting.remove(answer)
        self._network.pool.give_back(answer.table)
        self._finished[answer.finish(reason, error).finish_reason] += 1

    def _guard(self, answers: Sequence[Answer], work: Callable[[], None]) -> None:
        """Do the work; what the asker should know ends these answers, and only these."""
        try:
            work()
        except LascauxError as error:
            for answer in answers:
                if answer in self._active:
                    self._end(answer, "error", str(error))

    def _work(self) -> None:
        """The thread: steps while there is something to do, till it is told to stop."""
        while True:
            with self._changed:
                idle = not (self._active or self._waiting or self._submitted or self._cancelled)
                if idle and not self._accepts:
                    return
                if idle:
                    self._changed.wait(IDLE_SECONDS)
                    continue
            try:
                self.step()
            except Exception:  # our bug: those who wait must hear of it, others be served
                logging.exception("the engine failed in a step")
                for answer in list(self._active):
                    self._network.pool.forget(answer.table)
                    self._end(answer, "error", "internal error")
            if time.monotonic() > self._ends_at:
                with self._changed:
                    self._waiting.extend(self._submitted)
                    self._submitted.clear()
                for answer in [*self._active, *self._waiting]:
                    self._end(answer, "cancelled")
