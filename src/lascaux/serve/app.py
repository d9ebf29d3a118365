"""The routes."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from importlib.resources import files
from typing import Any, cast

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from lascaux.errors import RequestError
from lascaux.serve.bodies import CLOSE, read_body
from lascaux.serve.calls import chat_call, completion_call, embedding_call
from lascaux.serve.fields import Body, check_ids, read_fields
from lascaux.serve.guard import Guard
from lascaux.serve.metrics import CONTENT_TYPE
from lascaux.serve.refusals import Refusal
from lascaux.serve.respond import JsonResponse, refusal_response, respond, respond_embeddings
from lascaux.serve.served import Served
from lascaux.serve.state import ServerState

PLAYGROUND = str(files("lascaux.serve") / "playground")
Handler = Callable[[HttpRequest], Awaitable[Response]]


def build_app(state: ServerState) -> Starlette:
    """The application: routes behind the guard, errors in OpenAI's shape."""
    post, get = ["POST"], ["GET"]
    on = partial(_with_state, state)
    routes = [
        Route("/v1/completions", on(completions), methods=post),
        Route("/v1/chat/completions", on(chat), methods=post),
        Route("/v1/embeddings", on(embeddings), methods=post),
        Route("/v1/models", on(models), methods=get),
        Route("/v1/models/{name:path}", on(model), methods=get),
        Route("/tokenize", on(tokenize), methods=post),
        Route("/detokenize", on(detokenize), methods=post),
        Route("/tokenizer_info", on(tokenizer_info), methods=get),
        Route("/health", on(health), methods=get),
        Route("/metrics", on(metrics), methods=get),
        Route("/", page, methods=get),
        Mount("/playground", StaticFiles(directory=PLAYGROUND)),
    ]
    middleware = [Middleware(Guard, state=state)]
    if state.settings.allowed_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(state.settings.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
            expose_headers=["retry-after"],
        )
        middleware.insert(0, cors)
    handlers: dict[Any, Any] = {
        RequestError: _refused,
        HTTPException: _not_found,
        Exception: partial(_failed, state),
    }
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)


def _with_state(
    state: ServerState, handler: Callable[[HttpRequest, ServerState], Awaitable[Response]]
) -> Handler:
    async def handle(http: HttpRequest) -> Response:
        return await handler(http, state)

    return handle


async def completions(http: HttpRequest, state: ServerState) -> Response:
    """POST /v1/completions."""
    served = state.model()
    call = await asyncio.to_thread(completion_call, await read_body(http, state), served)
    return await respond(http, call, served, state.metrics)


async def chat(http: HttpRequest, state: ServerState) -> Response:
    """POST /v1/chat/completions."""
    served = state.model()
    call = await asyncio.to_thread(chat_call, await read_body(http, state), served)
    return await respond(http, call, served, state.metrics)


async def embeddings(http: HttpRequest, state: ServerState) -> Response:
    """POST /v1/embeddings."""
    served = state.model()
    body = await read_body(http, state)
    requests, form = await asyncio.to_thread(embedding_call, body, served)
    return await respond_embeddings(http, requests, form, served, state.metrics)


async def models(http: HttpRequest, state: ServerState) -> Response:
    """GET /v1/models."""
    return JsonResponse({"object": "list", "data": [state.model().describe()]})


async def model(http: HttpRequest, state: ServerState) -> Response:
    """GET /v1/models/NAME."""
    served = state.model()
    served.check_model(http.path_params["name"])
    return JsonResponse(served.describe())


async def tokenize(http: HttpRequest, state: ServerState) -> Response:
    """POST /tokenize: ids of a text, names of special tokens one id each."""
    served = state.model()
    body = await read_body(http, state)
    ids = await asyncio.to_thread(_tokenized, body, served)
    return JsonResponse({"tokens": ids, "count": len(ids), "max_model_len": served.max_context})


def _tokenized(body: Body, served: Served) -> list[int]:
    fields = read_fields(body, "tokenize")
    text = body.get("prompt") if fields["content"] is None else fields["content"]
    if not isinstance(text, str):
        raise Refusal("'prompt' must be a text", field="prompt")
    begin_ids = served.roles.begin_ids if fields["add_special_tokens"] else ()
    return [*begin_ids, *served.tokenizer.encode_marked(text)]


async def detokenize(http: HttpRequest, state: ServerState) -> Response:
    """POST /detokenize: the text of ids, special tokens by their names."""
    served = state.model()
    body = await read_body(http, state)
    text = await asyncio.to_thread(_detokenized, body, served)
    return JsonResponse({"prompt": text, "content": text})


def _detokenized(body: Body, served: Served) -> str:
    given, tokenizer = read_fields(body, "detokenize")["tokens"], served.tokenizer
    if given is None:
        raise Refusal("'tokens' is missing", field="tokens")
    ids = check_ids(given, "tokens", tokenizer.vocab_size)
    written = [tokenizer.token_bytes(i) or tokenizer.token_name(i).encode() for i in ids]
    return b"".join(written).decode("utf-8", errors="replace")


async def tokenizer_info(http: HttpRequest, state: ServerState) -> Response:
    """GET /tokenizer_info."""
    served = state.model()
    roles = served.roles
    return JsonResponse(
        {
            "eos_token": roles.end_token,
            "eos_token_id": served.tokenizer.token_id(roles.end_token),
            "bos_token": roles.begin_token,
            "begin_ids": list(roles.begin_ids),
            "pad_token": roles.pad_token,
            "chat_template": roles.chat_template,
            "vocab_size": served.tokenizer.vocab_size,
            "max_model_len": served.max_context,
        }
    )


async def health(http: HttpRequest, state: ServerState) -> Response:
    """GET /health: 200 once requests are answered."""
    try:
        state.model()
    except Refusal as refusal:
        error = {"code": 503, "message": refusal.message, "type": "unavailable_error"}
        return JsonResponse({"error": error}, 503, refusal.headers)
    return JsonResponse({"status": "ok"})


async def metrics(http: HttpRequest, state: ServerState) -> Response:
    """GET /metrics."""
    return Response(state.metrics.text(), media_type=CONTENT_TYPE)


async def page(http: HttpRequest) -> Response:
    """GET /: the playground."""
    return FileResponse(f"{PLAYGROUND}/index.html", headers={"cache-control": "no-cache"})


async def _refused(http: HttpRequest, error: Exception) -> Response:
    refusal = error if isinstance(error, Refusal) else Refusal(str(error))
    return refusal_response(refusal)


async def _not_found(http: HttpRequest, error: Exception) -> Response:
    found = cast(HTTPException, error)
    words = {404: "there is nothing at", 405: f"{http.method} is not for"}
    message = f"{words.get(found.status_code, found.detail)} {http.url.path[:100]!r}"
    return refusal_response(Refusal(message, status=found.status_code, headers=found.headers))


async def _failed(state: ServerState, http: HttpRequest, error: Exception) -> Response:
    state.metrics.failed(500)
    # uvicorn closes the connection after an exception; the client must know before it asks again
    refusal = Refusal("internal error", status=500, code="internal_error", headers=CLOSE)
    return refusal_response(refusal)
