"""One answer in the making: its tokens, its text, where its keys and values lie."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lascaux.data.roles import TokenRoles
from lascaux.data.tokenizer import Tokenizer
from lascaux.generate.draft import Lookup
from lascaux.generate.request import FinishReason, Outcome, Piece, Request, ScoredToken
from lascaux.generate.sampling import (
    History,
    Row,
    check_finite,
    draw,
    likeliest,
    log_normaliser,
)
from lascaux.generate.text import TextStream

Deliver = Callable[[Piece], Any]


class Answer:
    """What the engine knows of one request."""

    def __init__(
        self,
        request: Request,
        deliver: Deliver,
        *,
        tokenizer: Tokenizer,
        roles: TokenRoles,
        most_tokens: int,
        draft_tokens: int,
    ) -> None:
        self.request, self.sampling = request, request.sampling
        self.ticket = 0
        self.tokens = list(request.prompt)
        self.prompt_length = len(request.prompt)
        self.most_tokens = most_tokens
        """that may be drawn: what was asked for, as far as the context holds it"""
        self.keys: list[bytes] = []
        """names of the prompt's whole pages, where they may be kept"""
        self.table: list[int] = []
        self.computed = self.cached_tokens = 0
        """tokens whose keys and values are there; those of them that were found"""
        self.embedding: Tensor | None = None
        """sum of the outputs so far"""
        self.finish_reason: FinishReason | None = None
        self.undeliverable = False
        self._deliver, self._roles = deliver, roles
        self._text = TextStream(tokenizer, request.prompt, self.sampling)
        self._history = History(request.prompt)
        self._draft_tokens = draft_tokens
        self._lookup = Lookup(request.prompt) if draft_tokens else None
        self._drafted = self._accepted = 0
        self._scored_prompt: list[ScoredToken] = []
        self._piece_text, self._piece_tokens = "", list[ScoredToken]()
        self._submitted_at = time.perf_counter()
        self._admitted_at = self._first_at = 0.0

    @property
    def num_drawn(self) -> int:
        """Tokens drawn so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def reads(self) -> bool:
        """Whether some of the prompt is still to be computed."""
        return self.computed < self.prompt_length

    def admit(self, table: Sequence[int], cached_tokens: int) -> None:
        """Computing begins, in these pages, of which the first hold so many tokens already."""
        self.table = list(table)
        self.computed = self.cached_tokens = cached_tokens
        self._admitted_at = time.perf_counter()

    def score_prompt(self, logits: Row, start: int) -> None:
        """Score the prompt's tokens that the logits (T V) of positions from `start` predict."""
        check_finite(logits)
        if start == 0:
            self._scored_prompt.append(ScoredToken(self.tokens[0]))
        for number, row in enumerate(logits, start=start + 1):
            if number < self.prompt_length:
                self._scored_prompt.append(self._score(row, self.tokens[number]))

    def guess(self) -> list[int]:
        """Tokens that may come next, none where that is not wanted."""
        if self._lookup is None:
            return []
        return self._lookup.guess(min(self._draft_tokens, self.most_tokens - self.num_drawn - 1))

    def draw(self, logits: Row) -> int:
        """Draw the next token from the logits (V) after the last one; ends the answer perhaps.

        Raises: LascauxError for logits that are not finite, and where no token may be drawn.
        """
        check_finite(logits)
        token = draw(self._allowed(logits), self.sampling, self.num_drawn)
        if self.num_drawn == 0:
            self._first_at = time.perf_counter()
        self.tokens.append(token)
        self._history.drawn[token] += 1
        if self._lookup is not None:
            self._lookup.append(token)
        scored = ScoredToken(token)
        if self.request.top_logprobs is not None:
            scored = self._score(logits, token)
        ends_text = token in self._roles.end_ids and not self.sampling.ignore_end_of_text
        stops = token in self.sampling.stop_token_ids
        silent = ends_text or (stops and not self.sampling.include_stop)
        text, tokens = self._text.feed(scored, silent=silent)
        self._piece_text += text
        self._piece_tokens += tokens
        if ends_text:
            self.finish_reason = "end_of_text"
        elif stops or self._text.stopped:
            self.finish_reason = "stop"
        elif self.num_drawn >= self.most_tokens:
            self.finish_reason = "length"
        return token

    def count_guesses(self, drafted: int, accepted: int) -> None:
        """So many guesses were checked, and so many right."""
        self._drafted += drafted
        self._accepted += accepted

    def hand_over(self) -> None:
        """Deliver what has become certain, if anything has."""
        if self._piece_text or self._piece_tokens or self._scored_prompt:
            self._send(self._take_piece(None))

    def finish(self, reason: FinishReason, error: str | None = None) -> Outcome:
        """Deliver the last piece; returns its outcome."""
        text, tokens = self._text.finish()
        self._piece_text += text
        self._piece_tokens += tokens
        if self._text.stopped and reason in ("length", "end_of_text"):
            reason = "stop"  # completed by the sign for an unfinished character
        self.finish_reason = reason
        outcome = self._outcome(reason, error)
        self._send(self._take_piece(outcome))
        return outcome

    def _send(self, piece: Piece) -> None:
        """Whoever asked may fail; nobody else shall notice."""
        try:
            self._deliver(piece)
        except Exception:
            logging.exception("a piece of an answer could not be handed over")
            self.undeliverable = True

    def _allowed(self, logits: Row) -> Row:
        """The logits to draw from."""
        penalised = self._history.penalise(logits, self.sampling)
        if self.num_drawn < self.sampling.min_tokens:
            penalised = penalised.copy()
            ends = [*self._roles.end_ids, *self.sampling.stop_token_ids]
            penalised[[token for token in ends if token < len(penalised)]] = -np.inf
        return penalised

    def _score(self, logits: Row, token: int) -> ScoredToken:
        normaliser = log_normaliser(logits)
        top = likeliest(logits, count) if (count := self.request.top_logprobs) else ()
        return ScoredToken(
            token,
            float(logits[token]) - normaliser,
            tuple((int(other), float(logits[other]) - normaliser) for other in top),
        )

    def _take_piece(self, outcome: Outcome | None) -> Piece:
        embedding = None
        if outcome is not None and outcome.error is None and self.embedding is not None:
            mean = self.embedding / self.prompt_length
            embedding = tuple((mean / mean.norm()).tolist())
        piece = Piece(
            text=self._piece_text,
            tokens=tuple(self._piece_tokens),
            prompt=tuple(self._scored_prompt),
            embedding=embedding,
            outcome=outcome,
        )
        self._piece_text, self._piece_tokens, self._scored_prompt = "", [], []
        return piece

    def _outcome(self, reason: FinishReason, error: str | None) -> Outcome:
        now = time.perf_counter()
        admitted = self._admitted_at or now
        first = self._first_at or now
        return Outcome(
            finish_reason=reason,
            prompt_tokens=self.prompt_length,
            cached_tokens=self.cached_tokens,
            drawn_tokens=self.num_drawn,
            waited_seconds=admitted - self._submitted_at,
            prompt_seconds=first - admitted,
            drawing_seconds=now - first,
            drafted_tokens=self._drafted,
            accepted_tokens=self._accepted,
            error=error,
        )
