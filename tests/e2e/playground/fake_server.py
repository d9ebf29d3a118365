"""A server that answers as ours does, from a script: the oracle of the playground's tests.

Tokens are common words, else bytes. What comes next depends on the last token and the seed alone.
"""

import asyncio
import json
import math
import random
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

PLAYGROUND = str(files("lascaux.serve") / "playground")
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; font-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-cache",
}
END = "<|endoftext|>"
WORDS = (
    " the", " a", " river", " light", " painted", " horse", " cave", " and", " walls", " ran",
    " of", " stone", " over", ",", ".", "\n", " deer", " red", " slowly", " in",
    "Once", " upon", " time",
)  # fmt: skip
DRAWN = WORDS[:20]
TOKENS: list[bytes] = [
    END.encode(),
    *(bytes([value]) for value in range(256)),
    *(word.encode() for word in WORDS),
]
IDS = {content: number for number, content in enumerate(TOKENS)}
MAX_CONTEXT = 2048


def name_of(token: int) -> str:
    try:
        return TOKENS[token].decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{value:02x}" for value in TOKENS[token])


def encode(text: str) -> list[int]:
    rest, ids = text.encode(), []
    while rest:
        longest = max((t for t in TOKENS if rest.startswith(t)), key=len)
        ids.append(IDS[longest])
        rest = rest[len(longest) :]
    return ids


def contribution(ids: list[int], before: bytes = b"") -> list[str]:
    """The text that each token adds."""
    shown, texts, content = before.decode(errors="ignore"), [], before
    for token in ids:
        content += b"" if token == 0 else TOKENS[token]
        now = content.decode(errors="ignore")
        texts.append(now[len(shown) :])
        shown = now
    return texts


def likely(last: int) -> list[tuple[int, float]]:
    """(id, probability) of what may follow a token, likeliest first."""
    content = TOKENS[last]
    if content == b"!":  # then comes a character of four tokens
        return [(IDS[b"\xf0"], 0.7), (IDS[b" the"], 0.3)]
    after = {b"\xf0": b"\x9f", b"\x9f": b"\x98", b"\x98": b"\x80"}.get(content)
    if after:
        return [(IDS[after], 0.9), (IDS[b" the"], 0.1)]
    if content == b"#":
        return [(0, 0.8), (IDS[b" the"], 0.2)]
    draw = random.Random(last)
    weights = {word: draw.random() ** 4 + 0.002 for word in DRAWN}
    total = sum(weights.values())
    ranked = sorted(weights.items(), key=lambda pair: -pair[1])
    return [(IDS[word.encode()], weight / total) for word, weight in ranked]


@dataclass
class FakeServer:
    """Settings a test may change, and what was asked."""

    token_seconds: float = 0.0
    fail_after: int | None = None
    key: str | None = None
    loading: bool = False
    prefixed: bool = False
    """the tokenizer puts a space before a text, as SentencePiece's do"""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    def reset(self) -> None:
        self.token_seconds, self.fail_after, self.key = 0.0, None, None
        self.loading = self.prefixed = False
        self.bodies.clear()

    def refusal(self, request: Request) -> Response | None:
        if self.loading:
            return error("Loading model", 503)
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return error("this server wants an API key", 401)
        return None


def error(message: str, status: int, code: str | None = None) -> Response:
    body = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": body}, status)


def draw(body: dict[str, Any], ids: list[int], choice: int) -> list[int]:
    chance = random.Random(f"{body['seed']} {choice}")
    ids, drawn = list(ids), []
    while len(drawn) < body["max_tokens"]:
        options = likely(ids[-1])
        point, token = chance.random(), options[0][0]
        if body["temperature"] > 0:
            for token, probability in options:  # noqa: B007
                point -= probability
                if point <= 0:
                    break
        ids.append(token)
        drawn.append(token)
        if token == 0 and not body.get("ignore_eos"):
            break
    return drawn


def top_of(last: int, own: int, count: int) -> list[tuple[int, float]]:
    options = likely(last)
    kept = options[:count]
    if all(token != own for token, _ in kept):
        kept.append((own, dict(options).get(own, 1e-6)))
    return kept


def scores(context: list[int], ids: list[int], texts: list[str], count: int) -> dict[str, Any]:
    """The `logprobs` of tokens that come after a context."""
    lasts = [*context[-1:], *ids][: len(ids)] if context else [None, *ids[:-1]]
    pairs = zip(lasts, ids, strict=True)
    tops = [None if last is None else top_of(last, own, count) for last, own in pairs]
    logprobs = [
        None if top is None else math.log(dict(top)[own])
        for top, own in zip(tops, ids, strict=True)
    ]
    return {
        "tokens": texts,
        "token_logprobs": logprobs,
        "top_logprobs": [
            None if top is None else {name_of(token): math.log(p) for token, p in top}
            for top in tops
        ],
        "top_token_ids": [
            None if top is None else {name_of(token): token for token, _ in top} for top in tops
        ],
        "text_offset": [0] * len(ids),
    }


def chat_scores(context: list[int], ids: list[int], count: int) -> dict[str, Any]:
    entries = []
    for place, token in enumerate(ids):
        last = [*context, *ids][len(context) + place - 1]
        top = top_of(last, token, count)
        named = [
            {"id": i, "token": name_of(i), "logprob": math.log(p), "bytes": list(TOKENS[i])}
            for i, p in top
        ]
        own = next(entry for entry in named if entry["id"] == token)
        entries.append({**own, "top_logprobs": named})
    return {"content": entries}


def cut_at_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    places = [text.find(stop) for stop in stops if stop in text]
    return (text[: min(places)], True) if places else (text, False)


class Script:
    """One answer: its chunks, of one token each."""

    def __init__(self, body: dict[str, Any], prompt: list[int], chat: bool) -> None:
        self.body, self.prompt, self.chat = body, prompt, chat

    def chunks(self, choice: int) -> list[dict[str, Any]]:
        drawn = draw(self.body, self.prompt, choice)
        before = b"".join(TOKENS[token] for token in self.prompt)
        texts = contribution(drawn, before)
        final, stopped = cut_at_stop("".join(texts), self.body.get("stop") or [])
        made, sent, seen = [], 0, ""
        for place, token in enumerate(drawn):
            seen += texts[place]
            reason = None
            if cut_at_stop(seen, self.body.get("stop") or [])[1] or token == 0:
                reason = "stop"
            elif place + 1 == len(drawn):
                reason = "length"
                if not texts[place] and not stopped:  # a character that did not become complete
                    texts[place] = "\ufffd"
                    final, seen = final + "\ufffd", seen + "\ufffd"
            new = final[sent : len(seen)]
            made.append(self._chunk(choice, drawn, place, texts[place], new, reason))
            sent = max(sent, min(len(seen), len(final)))
            if reason == "stop":
                break
        return made

    def _chunk(
        self, choice: int, drawn: list[int], place: int, text: str, new: str, reason: str | None
    ) -> dict[str, Any]:
        context = [*self.prompt, *drawn[:place]]
        made: dict[str, Any] = {"index": choice, "finish_reason": reason}
        if self.chat:
            made["delta"] = {"role": "assistant", "content": new} if new or not place else {}
            made["logprobs"] = chat_scores(context, [drawn[place]], 8)
        else:
            made["text"] = new
            made["logprobs"] = scores(context, [drawn[place]], [text], self.body["logprobs"])
        made["token_ids"] = [drawn[place]]
        if place == 0:
            made["prompt_token_ids"] = self.prompt
        return made


async def events(server: FakeServer, script: Script) -> AsyncIterator[str]:
    body = script.body
    head = {"id": "fake", "model": "fake", "seed": body["seed"]}
    by_choice = [script.chunks(choice) for choice in range(body.get("n", 1))]
    sent = 0
    yield ": still here\n\n"
    for place in range(max(map(len, by_choice))):
        for chunks in by_choice:
            if place >= len(chunks):
                continue
            if server.fail_after is not None and sent >= server.fail_after:
                yield f"data: {json.dumps({'error': {'message': 'out of memory'}})}\n\n"
                return
            await asyncio.sleep(server.token_seconds)
            yield f"data: {json.dumps(head | {'choices': [chunks[place]]})}\n\n"
            sent += 1
    usage = {"prompt_tokens": len(script.prompt), "completion_tokens": sent}
    yield f"data: {json.dumps(head | {'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"


def build(server: FakeServer) -> Starlette:
    async def completions(request: Request) -> Response:
        body = await request.json()
        server.bodies.append(body)
        if refused := server.refusal(request):
            return refused
        ids = body["prompt"] if isinstance(body["prompt"], list) else encode(body["prompt"])
        if len(ids) >= MAX_CONTEXT:
            return error(f"the prompt has {len(ids)} tokens", 400, "context_length_exceeded")
        if body.get("echo"):
            choice = {"index": 0, "text": "", "finish_reason": "length", "prompt_token_ids": ids}
            choice["logprobs"] = scores([], ids, contribution(ids), body["logprobs"])
            return JSONResponse({"choices": [choice | {"token_ids": []}]})
        if not body.get("stream"):
            chunks = Script({"logprobs": 1, **body}, ids, False).chunks(0)
            return JSONResponse({"choices": [{"text": "".join(each["text"] for each in chunks)}]})
        return StreamingResponse(events(server, Script(body, ids, False)), headers=STREAM)

    async def chat(request: Request) -> Response:
        body = await request.json()
        server.bodies.append(body)
        if refused := server.refusal(request):
            return refused
        turns = [f"{each['role']}: {each['content']}\n" for each in body["messages"]]
        prompt = encode("".join(turns) + "assistant:")
        return StreamingResponse(events(server, Script(body, prompt, True)), headers=STREAM)

    async def tokenize(request: Request) -> Response:
        body = await request.json()
        text = " " * (server.prefixed and body["prompt"] != "") + body["prompt"]
        return server.refusal(request) or JSONResponse({"tokens": encode(text)})

    async def detokenize(request: Request) -> Response:
        tokens = (await request.json())["tokens"]
        return JSONResponse({"prompt": "".join(contribution(tokens))})

    async def models(request: Request) -> Response:
        facts = {"id": "fake", "max_model_len": MAX_CONTEXT, "precision": "fp32"}
        return server.refusal(request) or JSONResponse({"data": [facts]})

    async def info(request: Request) -> Response:
        facts = {"eos_token": END, "chat_template": None}
        return server.refusal(request) or JSONResponse(facts)

    async def page(request: Request) -> Response:
        return FileResponse(f"{PLAYGROUND}/index.html", headers=HEADERS)

    return Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", models),
            Route("/tokenize", tokenize, methods=["POST"]),
            Route("/detokenize", detokenize, methods=["POST"]),
            Route("/tokenizer_info", info),
            Route("/", page),
            Mount("/playground", StaticFiles(directory=PLAYGROUND)),
        ]
    )


STREAM = {"content-type": "text/event-stream"}


def start(server: FakeServer) -> tuple[uvicorn.Server, threading.Thread]:
    """Serves on a free port in a thread; `server.url` is set when this returns."""
    config = uvicorn.Config(build(server), port=0, log_level="error", timeout_graceful_shutdown=1)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        thread.join(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    server.url = f"http://127.0.0.1:{port}/"
    return running, thread
