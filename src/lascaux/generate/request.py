"""What is asked of the engine and what it answers.

A request is token ids and how to draw more of them; the answer comes in pieces. Texts, templates
and wire formats are the caller's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lascaux.errors import RequestError

FinishReason = Literal["stop", "length", "end_of_text", "cancelled", "error"]


class QueueFull(RequestError):
    """As many requests wait as may wait; ask again later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the tokens of one answer are drawn, and where it ends."""

    max_tokens: int | None = None
    """most tokens to draw; None: as many as the context holds"""
    min_tokens: int = 0
    """before so many no end-of-text id is drawn and no stop string counts"""
    temperature: float = 1.0
    """0 takes the likeliest token"""
    top_k: int = 0
    """draw from the k likeliest tokens only; 0: all"""
    top_p: float = 1.0
    """draw from the fewest tokens that together reach this probability"""
    min_p: float = 0.0
    """leave out tokens below this fraction of the likeliest one's probability"""
    typical_p: float = 1.0
    """draw from the tokens of most usual information that together reach this probability"""
    presence_penalty: float = 0.0
    """taken from the logits of tokens that were drawn before"""
    frequency_penalty: float = 0.0
    """taken from the logits of tokens once for each time they were drawn before"""
    repetition_penalty: float = 1.0
    """divides positive and multiplies negative logits of tokens of the prompt and the answer"""
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    """added to the logits of these ids"""
    seed: int = 0
    """the same seed gives the same text"""
    choice: int = 0
    """number of this answer among several to one prompt; each has draws of its own"""
    stop: tuple[str, ...] = ()
    """end before any of these strings"""
    include_stop: bool = False
    """end after the stop string instead of before it"""
    stop_token_ids: tuple[int, ...] = ()
    """end at any of these ids, as at the end of text"""
    ignore_end_of_text: bool = False
    """go on after an end-of-text id"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt and one answer; or, with `max_tokens` 0, a prompt to be scored or embedded."""

    prompt: tuple[int, ...]
    """token ids, at least one"""
    sampling: Sampling = field(default_factory=Sampling)
    top_logprobs: int | None = None
    """also log-probabilities of the tokens drawn, and of so many of the likeliest; None: neither"""
    score_prompt: bool = False
    """those of the prompt's tokens as well; needs `top_logprobs`"""
    embed: bool = False
    """answer with one vector: the mean of the final norm's outputs, of length 1"""


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token, with its log-probability where that was asked for.

    Probabilities are the model's own, before penalties, temperature and filters; in nats.
    """

    id: int
    logprob: float | None = None
    """None also for the first token of a prompt, which nothing predicts"""
    top: tuple[tuple[int, float], ...] = ()
    """the likeliest ids with their log-probabilities, likeliest first"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How an answer ended, and what it took.

    stop: a stop string or a stop id came. end_of_text: the model ended the text. length:
    `max_tokens` are drawn, or the context is full.
    """

    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    """of the prompt, whose keys and values were there already"""
    drawn_tokens: int
    """the one that ended the text included"""
    waited_seconds: float
    prompt_seconds: float
    """from the first computation to the first token"""
    drawing_seconds: float
    """from the first token to the last"""
    drafted_tokens: int = 0
    """guessed from the text so far"""
    accepted_tokens: int = 0
    """of those, how many were what would have been drawn anyway"""
    error: str | None = None
    """why an answer ended with "error", for the person who asked"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """The next part of an answer; the last one has an outcome.

    Joined, the texts of all pieces are the answer's text: characters come whole, and nothing that
    may become a stop string is sent before that is decided. A token comes with the piece that has
    the end of its text, so that texts and tokens stay together; all tokens drawn come, those of a
    stop string and of the end included.
    """

    text: str = ""
    tokens: tuple[ScoredToken, ...] = ()
    prompt: tuple[ScoredToken, ...] = ()
    """the prompt's tokens, in the first piece, where `score_prompt` was asked for"""
    embedding: tuple[float, ...] | None = None
    outcome: Outcome | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """How much is taken on at once."""

    max_streams: int = 8
    """answers computed at the same time"""
    max_waiting: int = 256
    """answers that may wait"""
    cache_tokens: int | None = None
    """tokens whose keys and values are kept; None: max_streams contexts, in a quarter of memory"""
    reuse_prefixes: bool = True
    """keep the pages of prompts for later prompts that begin alike"""
    draft_tokens: int = 0
    """tokens to guess from earlier text and check in one pass"""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFigures:
    """What goes on, and totals since the engine was made."""

    running: int
    waiting: int
    cache_pages: int
    cache_pages_used: int
    cache_bytes: int
    weight_bytes: int
    steps: int
    """in which answers got tokens"""
    rows: int
    """token rows computed in them; over steps: how many at once"""
    prompt_tokens: int
    cached_tokens: int
    drawn_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    finished: dict[FinishReason, int]
