"""One table of what a request may say, and how much of everything the server takes on.

`fields.py` checks requests against `TABLE`, docs/serving.md shows it, and the tests go through its
rows. A field `name[]` stands for each entry of the list or object `name`. What depends on the model
(ids within its vocabulary, a prompt within its context) is checked in `calls.py` and `prompts.py`.
"""

from dataclasses import dataclass, field
from typing import Literal, TypeVar

Kind = Literal["whole number", "number", "true or false", "text", "list", "object", "texts"]
Route = Literal["completions", "chat", "embeddings", "tokenize", "detokenize"]
T = TypeVar("T", int, float)

DRAWING: tuple[Route, ...] = ("completions", "chat")
MOST_IDS, MOST_TOKENS, MOST_CHARS = 1_000_000, 1_000_000, 8 << 20
SEEDS = 1 << 63


@dataclass(frozen=True, slots=True)
class Row:
    """A field of requests: its type, range and default, and where it is heard.

    The range of a text is its characters, of lists and objects their entries. Kind "texts" is a
    text or a list of texts.
    """

    field: str
    kind: Kind
    lowest: float | None
    highest: float | None
    default: object
    words: str
    routes: tuple[Route, ...] = DRAWING


TABLE: tuple[Row, ...] = (
    Row("model", "text", 1, 1000, None, "the loaded model's name, or nothing",
        ("completions", "chat", "embeddings")),
    Row("prompt", "list", 1, 256, None, "a text, ids, or a list of texts or of lists of ids; "
        "null: the beginning of a text", ("completions",)),
    Row("messages", "list", 1, 4096, None, "the conversation, each with role and content",
        ("chat",)),
    Row("messages[].role", "text", 1, 9, None, "system, developer, user or assistant", ("chat",)),
    Row("messages[].content", "texts", 0, MOST_CHARS, None, "a text, or parts of type text",
        ("chat",)),
    Row("input", "list", 1, 256, None, "what to embed, in the forms of `prompt`", ("embeddings",)),
    Row("encoding_format", "text", 5, 6, "float", "float, or base64 of little-endian float32",
        ("embeddings",)),
    Row("max_tokens", "whole number", 0, MOST_TOKENS, 16, "most tokens to draw; 0 only with `echo`",
        ("completions",)),
    Row("max_tokens", "whole number", 1, MOST_TOKENS, None, "most tokens to draw; null: as many as "
        "the context holds", ("chat",)),
    Row("max_completion_tokens", "whole number", 1, MOST_TOKENS, None, "the same, and goes first",
        ("chat",)),
    Row("min_tokens", "whole number", 0, MOST_TOKENS, 0, "the text does not end before so many"),
    Row("temperature", "number", 0, 100, 1.0, "0 takes the likeliest token"),
    Row("top_p", "number", 0, 1, 1.0, "draw from the fewest tokens that reach this probability"),
    Row("top_k", "whole number", -1, MOST_IDS, 0, "draw from so many of the likeliest; 0, -1: all"),
    Row("min_p", "number", 0, 0.999, 0.0, "leave out tokens below this part of the likeliest one's "
        "probability"),
    Row("typical_p", "number", 0.001, 1, 1.0, "draw from the tokens of most usual information"),
    Row("presence_penalty", "number", -2, 2, 0.0, "taken from logits of tokens drawn before"),
    Row("frequency_penalty", "number", -2, 2, 0.0, "the same, once for each time"),
    Row("repetition_penalty", "number", 0.01, 100, 1.0, "divides positive, multiplies negative "
        "logits of tokens seen"),
    Row("logit_bias", "object", 0, 1024, None, "added to the logits of these ids"),
    Row("logit_bias[]", "number", -100, 100, None, "one of them; the keys are ids"),
    Row("n", "whole number", 1, 128, 1, "answers to each prompt"),
    Row("seed", "whole number", -SEEDS, SEEDS - 1, None, "the same seed gives the same text; null: "
        "a new one each time, reported in `seed`"),
    Row("stop", "texts", 0, 32, None, "end before any of these"),
    Row("stop[]", "text", 1, 1000, None, "one of them"),
    Row("stop_token_ids", "list", 0, 256, None, "end at any of these ids"),
    Row("include_stop_str_in_output", "true or false", None, None, False, "end after the stop "
        "string, not before it"),
    Row("ignore_eos", "true or false", None, None, False, "go on after the end of a text"),
    Row("logprobs", "whole number", -1, MOST_IDS, None, "log-probabilities, with so many of the "
        "likeliest tokens; -1: all", ("completions",)),
    Row("logprobs", "true or false", None, None, False, "log-probabilities of the tokens drawn",
        ("chat",)),
    Row("top_logprobs", "whole number", 0, MOST_IDS, None, "so many of the likeliest tokens beside "
        "them; needs `logprobs`", ("chat",)),
    Row("echo", "true or false", None, None, False, "the prompt goes before the answer, with its "
        "log-probabilities", ("completions",)),
    Row("stream", "true or false", None, None, False, "send the answer as it is made"),
    Row("stream_options", "object", 0, 8, None, "needs `stream`"),
    Row("stream_options.include_usage", "true or false", None, None, False, "a last chunk with the "
        "usage"),
    Row("return_token_ids", "true or false", None, None, False, "ids of prompt and answer as well"),
    Row("add_special_tokens", "true or false", None, None, True, "begin a text prompt as the "
        "model's texts begin", ("completions",)),
    Row("truncate_prompt_tokens", "whole number", 1, MOST_TOKENS, None, "keep only so many tokens "
        "at a prompt's end", ("completions",)),
    Row("prompt", "text", 0, MOST_CHARS, None, "the text; also as `content`", ("tokenize",)),
    Row("content", "text", 0, MOST_CHARS, None, "the text", ("tokenize",)),
    Row("add_special_tokens", "true or false", None, None, False, "begin it as the model's texts "
        "begin", ("tokenize",)),
    Row("tokens", "list", 0, MOST_IDS, None, "token ids", ("detokenize",)),
)  # fmt: skip


def rows_of(route: Route) -> tuple[Row, ...]:
    """The rows of one route."""
    return tuple(row for row in TABLE if route in row.routes)


def range_words(row: Row) -> str:
    """The range as messages and the documents say it; empty where there is none."""
    if row.lowest is None or row.highest is None:
        return ""
    unit = {"text": " characters", "list": " entries", "object": " entries", "texts": " entries"}
    if row.field == "messages[].content":
        unit = {"texts": " characters"}
    return f"{row.lowest:,} to {row.highest:,}{unit.get(row.kind, '')}"


def _limit(value: T, words: str) -> T:
    """A server limit and what it says; typed as its value, as dataclasses want it."""
    return field(default=value, metadata={"words": words})


@dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """What the server takes on, whatever a request says; the unit ends the name."""

    body_bytes: int = _limit(8 << 20, "of a request's body; beyond it 413")
    bodies_bytes: int = _limit(64 << 20, "of all bodies being received at once; beyond it 503")
    body_depth: int = _limit(32, "levels of lists and objects in a body")
    body_lists: int = _limit(20_000, "lists and objects in a body")
    body_seconds: float = _limit(60.0, "to receive a body; beyond it 408")
    header_seconds: float = _limit(20.0, "to receive a request's first lines, then it is closed")
    idle_seconds: int = _limit(30, "a connection stays open between two requests")
    connections: int = _limit(512, "at the same time; beyond it 503")
    request_seconds: float = _limit(3600.0, "for one request; beyond it 504, or an error event")
    answers: int = _limit(256, "of one request: prompts times `n`")
    logprob_entries: int = _limit(1_000_000, "of one request: tokens times (`logprobs` + 1)")
    backlog_pieces: int = _limit(4096, "of a stream waiting for a slow client; then it ends")
    send_seconds: float = _limit(60.0, "a client may leave its stream unread, then it is closed")
    comment_seconds: float = _limit(15.0, "of silence in a stream before a comment is sent")
    drain_seconds: float = _limit(60.0, "running answers have to finish after SIGTERM")
