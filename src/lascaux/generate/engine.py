"""Text from a model: one prompt, continued token by token, streamed as it becomes certain.

The pieces of text, joined, are the same text however it is read: characters are passed on whole,
stop strings never appear. The same model, prompt and settings give the same text; `sampling.py`
says how. One sequence at a time, with a cache of keys and values.
"""

import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import torch

from lascaux.config.schema import GenerateConfig
from lascaux.data.tokenizer import StreamDecoder, Tokenizer
from lascaux.errors import CheckpointError, RequestError
from lascaux.generate.cache import make_cache
from lascaux.generate.sampling import check_settings, sample, token_generator
from lascaux.generate.stops import StopMatcher
from lascaux.model.transformer import Transformer

FinishReason = Literal["stop", "length", "end_of_text"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedPiece:
    """Some more text; the last piece, whose text may be empty, has a finish reason.

    stop: a stop string came. end_of_text: the model ended the text. length: `max_tokens` are
    generated, or prompt and text fill the model's context.
    """

    text: str
    num_tokens: int
    """tokens drawn so far, the one that ended the text included"""
    finish_reason: FinishReason | None = None
    tokens_per_second: float | None = None
    """in the last piece: tokens drawn over the time spent computing, the prompt's included"""


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    settings: GenerateConfig,
    *,
    device: torch.device,
) -> Iterator[GeneratedPiece]:
    """Continue the prompt; an empty one stands for the beginning of a text.

    The request is checked here, tokens are drawn as the iterator is read. Prompt and generated text
    together never exceed `model.max_context` tokens; a prompt is never shortened.

    Raises: RequestError for settings out of range and for a prompt that leaves no room;
    CheckpointError for a tokenizer with more ids than the model.
    """
    check_settings(settings)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"tokenizer and model do not belong together: the tokenizer has "
            f"{tokenizer.vocab_size} ids, model.vocab_size is {model.config.vocab_size}"
        )
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"'prompt' is not valid text at character {error.start}; give it in UTF-8"
        ) from None
    tokens = tokenizer.encode(prompt) or [tokenizer.end_of_text_id]
    room = model.config.max_context - len(tokens)
    if room < 1:
        raise RequestError(
            f"'prompt' has {len(tokens)} tokens; model.max_context is {model.config.max_context}, "
            f"so that at most {model.config.max_context - 1} leave room for an answer; shorten it"
        )
    drawn = _draw_tokens(model, tokens, min(settings.max_tokens, room), tokenizer, settings, device)
    return _stream_text(drawn, tokenizer, settings)


def generate_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    settings: GenerateConfig,
    *,
    device: torch.device,
) -> str:
    """The whole continuation, without the prompt; raises what `generate` raises."""
    pieces = generate(model, tokenizer, prompt, settings, device=device)
    return "".join(piece.text for piece in pieces)


def _draw_tokens(
    model: Transformer,
    prompt: list[int],
    max_tokens: int,
    tokenizer: Tokenizer,
    settings: GenerateConfig,
    device: torch.device,
) -> Generator[int, None, None]:
    """At most `max_tokens` ids, the last one perhaps end-of-text."""
    dtype = next(model.parameters()).dtype
    cache = make_cache(model.config, 1, len(prompt) + max_tokens, dtype, device)
    unseen = prompt
    was_training = model.training
    model.eval()
    try:
        for index in range(max_tokens):
            with torch.inference_mode():
                x = model.residual(torch.tensor([unseen], device=device), cache=cache)
                logits = model.unembed(x[:, -1:])[:, 0, : tokenizer.vocab_size]
                drawn = sample(logits, settings, token_generator(settings.seed, index))
            token = int(drawn.item())
            yield token
            if token == tokenizer.end_of_text_id:
                return
            unseen = [token]
    finally:
        model.train(was_training)


def _stream_text(
    tokens: Generator[int, None, None], tokenizer: Tokenizer, settings: GenerateConfig
) -> Iterator[GeneratedPiece]:
    decoder, matcher = StreamDecoder(tokenizer), StopMatcher(settings.stop)
    text, num_tokens, seconds = "", 0, 0.0
    finish_reason: FinishReason = "length"
    with closing(tokens):
        while not matcher.found:
            started = time.perf_counter()
            token = next(tokens, None)
            seconds += time.perf_counter() - started
            if token is None:
                break
            num_tokens += 1
            if token == tokenizer.end_of_text_id:
                finish_reason = "end_of_text"
            text = matcher.feed(decoder.feed(token))
            if text and not matcher.found:
                yield GeneratedPiece(text=text, num_tokens=num_tokens)
                text = ""
    text += matcher.feed(decoder.flush()) + matcher.flush()
    yield GeneratedPiece(
        text=text,
        num_tokens=num_tokens,
        finish_reason="stop" if matcher.found else finish_reason,
        tokens_per_second=num_tokens / seconds,
    )
