"""From pieces of answers to OpenAI's objects: chunks of a stream, or one response.

A response is its chunks put together, so that both say the same.
"""

import base64
import codecs
import struct
from collections.abc import Sequence
from typing import Any

from lascaux.data.tokenizer import Tokenizer
from lascaux.generate.request import FinishReason, Outcome, Piece, ScoredToken
from lascaux.serve.calls import Call
from lascaux.serve.fields import finite
from lascaux.serve.served import Served

Json = dict[str, Any]
REASONS: dict[FinishReason, str] = {"stop": "stop", "end_of_text": "stop", "length": "length"}


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token on its own: its text, a special token's name, or `bytes:` and its bytes in hex."""
    content = tokenizer.token_bytes(token_id)
    try:
        return content.decode("utf-8") if content else tokenizer.token_name(token_id)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def top_mappings(tokenizer: Tokenizer, token: ScoredToken) -> tuple[dict[str, float], Json]:
    """Text → log-probability and text → id of the likeliest tokens and the one drawn, in order.

    Where two tokens are written alike, the less likely one is called `token_id:N`.
    """
    logprobs: dict[str, float] = {}
    ids: Json = {}
    others = [pair for pair in token.top if pair[0] != token.id]
    for token_id, logprob in sorted(
        [*others, (token.id, token.logprob or 0.0)], key=lambda pair: -pair[1]
    ):
        name = token_text(tokenizer, token_id)
        name = f"token_id:{token_id}" if name in logprobs else name
        logprobs[name], ids[name] = finite(logprob), token_id
    return logprobs, ids


class Answer:
    """One answer as its pieces come: `chunk` gives what each adds, `joined` all of them."""

    def __init__(self, call: Call, index: int, served: Served) -> None:
        self.call, self.index, self.served = call, index, served
        self.outcome: Outcome | None = None
        self._request = call.requests[index]
        self._begun = False
        self._chars = 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._prompt_texts = [self._text_of(token_id) for token_id in self._request.prompt]
        self._draws = self._request.sampling.max_tokens != 0
        if not self._draws:
            self._prompt_texts[-1] += self._utf8.decode(b"", final=True)

    def chunk(self, piece: Piece) -> Json | None:
        """The choice of a chunk for this piece, None where it would say nothing."""
        self.outcome = piece.outcome
        reason = None if piece.outcome is None else REASONS.get(piece.outcome.finish_reason)
        begins, self._begun = not self._begun, True
        texts = [self._text_of(token.id) for token in piece.tokens]
        if piece.outcome is not None and texts:
            texts[-1] += self._utf8.decode(b"", final=True)
        if self.call.kind == "chat":
            choice = self._chat_chunk(piece, begins)
        else:
            choice = self._completion_chunk(piece, texts, begins)
        choice |= {"finish_reason": reason}
        if self.call.return_token_ids:
            choice["token_ids"] = [token.id for token in piece.tokens]
            if begins:
                choice["prompt_token_ids"] = list(self._request.prompt)
        says = piece.text or (piece.tokens and (self.call.logprobs or self.call.return_token_ids))
        return choice if says or begins or piece.outcome is not None else None

    def _text_of(self, token_id: int) -> str:
        """What a token adds to the text; none where it ends the answer in silence."""
        sampling = self._request.sampling
        ends = token_id in self.served.roles.end_ids and not sampling.ignore_end_of_text
        stops = token_id in sampling.stop_token_ids and not sampling.include_stop
        silent = self._begun and (ends or stops)
        return self._utf8.decode(b"" if silent else self.served.tokenizer.token_bytes(token_id))

    def _completion_chunk(self, piece: Piece, texts: list[str], begins: bool) -> Json:
        tokens, text = list(piece.tokens), piece.text if self._draws else ""
        if begins and self.call.echo:
            tokens, texts = [*piece.prompt, *tokens], [*self._prompt_texts, *texts]
            text = "".join(self._prompt_texts) + text
        scores = self._completion_scores(tokens, texts) if self.call.logprobs else None
        return {"index": self.index, "text": text, "logprobs": scores}

    def _completion_scores(self, tokens: Sequence[ScoredToken], texts: Sequence[str]) -> Json:
        offsets: list[int] = []
        for text in texts:
            offsets.append(self._chars)
            self._chars += len(text)
        tops = [
            (None, None) if token.logprob is None else top_mappings(self.served.tokenizer, token)
            for token in tokens
        ]
        scores: Json = {
            "tokens": list(texts),
            "token_logprobs": [
                t.logprob if t.logprob is None else finite(t.logprob) for t in tokens
            ],
            "top_logprobs": [logprobs for logprobs, _ in tops],
            "text_offset": offsets,
        }
        if self.call.return_token_ids:
            scores["token_ids"] = [token.id for token in tokens]
            scores["top_token_ids"] = [ids for _, ids in tops]
        return scores

    def _chat_chunk(self, piece: Piece, begins: bool) -> Json:
        delta: Json = {"role": "assistant"} if begins else {}
        if piece.text or begins:
            delta["content"] = piece.text
        scores = None
        if self.call.logprobs:
            scores = {"content": [self._chat_score(token) for token in piece.tokens]}
        return {"index": self.index, "delta": delta, "logprobs": scores}

    def _chat_score(self, token: ScoredToken) -> Json:
        top = [self._named(token_id, logprob) for token_id, logprob in token.top]
        return self._named(token.id, token.logprob or 0.0) | {"top_logprobs": top}

    def _named(self, token_id: int, logprob: float) -> Json:
        content = self.served.tokenizer.token_bytes(token_id)
        named: Json = {
            "token": token_text(self.served.tokenizer, token_id),
            "logprob": finite(logprob),
            "bytes": list(content) if content else None,
        }
        return named | {"id": token_id} if self.call.return_token_ids else named


def join_chunks(call: Call, chunks: Sequence[Json]) -> Json:
    """The choice of a response that is not streamed."""
    joined: Json = {"index": chunks[0]["index"]}
    scores: Json | None = None
    if call.logprobs:
        parts = [chunk["logprobs"] for chunk in chunks]
        scores = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    if call.kind == "chat":
        text = "".join(chunk["delta"].get("content", "") for chunk in chunks)
        joined["message"] = {"role": "assistant", "content": text}
    else:
        joined["text"] = "".join(chunk["text"] for chunk in chunks)
    joined |= {"logprobs": scores, "finish_reason": chunks[-1]["finish_reason"]}
    if call.return_token_ids:
        joined["prompt_token_ids"] = chunks[0]["prompt_token_ids"]
        joined["token_ids"] = [token_id for chunk in chunks for token_id in chunk["token_ids"]]
    return joined


def usage_of(call: Call, outcomes: Sequence[Outcome]) -> Json:
    """Tokens of the prompts, each counted once whatever `n` is, and of all answers."""
    firsts = outcomes[:: call.n]
    prompt, drawn = sum(o.prompt_tokens for o in firsts), sum(o.drawn_tokens for o in outcomes)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": drawn,
        "total_tokens": prompt + drawn,
        "prompt_tokens_details": {"cached_tokens": sum(o.cached_tokens for o in firsts)},
    }


def timings_of(outcomes: Sequence[Outcome]) -> Json:
    """Tokens and milliseconds as llama.cpp's server sends them, summed over the answers."""
    computed = sum(o.prompt_tokens - o.cached_tokens for o in outcomes)
    prompt_ms = 1e3 * sum(o.prompt_seconds for o in outcomes)
    drawn = sum(o.drawn_tokens for o in outcomes)
    drawing_ms = 1e3 * sum(o.drawing_seconds for o in outcomes)
    later = sum(max(0, o.drawn_tokens - 1) for o in outcomes)
    return {
        "cache_n": sum(o.cached_tokens for o in outcomes),
        "prompt_n": computed,
        "prompt_ms": prompt_ms,
        "prompt_per_second": 1e3 * computed / prompt_ms if prompt_ms else 0.0,
        "predicted_n": drawn,
        "predicted_ms": drawing_ms,
        "predicted_per_second": 1e3 * later / drawing_ms if drawing_ms else 0.0,
        "draft_n": sum(o.drafted_tokens for o in outcomes),
        "draft_n_accepted": sum(o.accepted_tokens for o in outcomes),
    }


def embedding_object(vectors: Sequence[Sequence[float]], form: str) -> list[Json]:
    """The `data` of a response with embeddings, numbers or base64 of little-endian float32."""
    return [
        {
            "object": "embedding",
            "index": index,
            "embedding": list(vector)
            if form == "float"
            else base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii"),
        }
        for index, vector in enumerate(vectors)
    ]
