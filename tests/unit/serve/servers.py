"""A server in this process, over an engine that says what a test scripted, or over a real one."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import httpx
import openai
import tokenizers

from lascaux.config.schema import GenerateConfig, ServeConfig
from lascaux.data.roles import TokenRoles
from lascaux.data.tokenizer import Tokenizer
from lascaux.generate.engine import Engine
from lascaux.generate.request import (
    EngineFigures,
    EngineOptions,
    Outcome,
    Piece,
    QueueFull,
    Request,
    ScoredToken,
)
from lascaux.serve.keys import Keys
from lascaux.serve.limits import ServerLimits
from lascaux.serve.run import Loading, Server, listen
from lascaux.serve.served import Served
from lascaux.serve.state import ServerState

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HTTP = httpx.Client(verify=False, trust_env=False, timeout=20)
TEXTS = [
    "Zwölf Boxkämpfer jagen Viktor über den großen Sylter Deich. 🦊🐴 naïve café",
    "Hello World!",
]


def with_specials(tokenizer: Tokenizer, *names: str) -> Tokenizer:
    inner = tokenizers.Tokenizer.from_str(tokenizer.json)
    inner.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in names])
    return Tokenizer(inner)


Script = Callable[[Request], Iterable[Piece]]


class FakeEngine:
    """Answers by a script; a script that waits on `released` is an answer that takes long."""

    def __init__(self, tokenizer: Tokenizer, script: Script | None = None, **given: Any) -> None:
        self.script = script or self.count_up
        self.max_context = given.pop("max_context", 64)
        self.options = EngineOptions(max_streams=2, max_waiting=given.pop("max_waiting", 6))
        template = given.pop("chat_template", None)
        end_id = tokenizer.token_id("<|im_end|>")
        assert end_id is not None
        roles = TokenRoles(
            end_ids=(tokenizer.end_of_text_id, end_id),
            begin_ids=given.pop("begin_ids", ()),
            end_token="<|endoftext|>",
            chat_template=template,
        )
        self.loaded = SimpleNamespace(
            tokenizer=tokenizer, roles=roles, settings=GenerateConfig(), precision="fp32"
        )
        self.asked: list[Request] = []
        self.cancelled: set[int] = set()
        self.live: set[int] = set()
        self.released = threading.Event()
        self.changed = threading.Condition()
        self._lock = threading.Lock()

    def submit(self, asked: Sequence[tuple[Request, Callable[[Piece], Any]]]) -> list[int]:
        with self._lock:
            if len(self.live) + len(asked) > self.options.max_streams + self.options.max_waiting:
                raise QueueFull("too many answers wait; ask again later")
            tickets = []
            for request, _ in asked:
                self.asked.append(request)
                tickets.append(len(self.asked))
                self.live.add(len(self.asked))
        for ticket, (request, deliver) in zip(tickets, asked, strict=True):
            threading.Thread(target=self._answer, args=(ticket, request, deliver)).start()
        return tickets

    def _answer(self, ticket: int, request: Request, deliver: Callable[[Piece], Any]) -> None:
        try:
            for piece in self.script(request):
                if ticket in self.cancelled:
                    deliver(Piece(outcome=outcome(request, 0, "cancelled")))
                    return
                deliver(piece)
        finally:
            with self.changed:
                self.live.discard(ticket)
                self.changed.notify_all()

    def cancel(self, tickets: Iterable[int]) -> None:
        self.cancelled.update(tickets)

    def stop(self, drain_seconds: float) -> None:
        self.cancel(list(self.live))

    def wait_until_free(self) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: not self.live, timeout=10)

    def figures(self) -> EngineFigures:
        names = EngineFigures.__dataclass_fields__
        values: dict[str, Any] = dict.fromkeys(names, 1) | {"finished": {"stop": 3, "length": 1}}
        return EngineFigures(**values)

    def count_up(self, request: Request) -> Iterator[Piece]:
        """Draws "a", "b", "c", …, a piece each."""
        most = request.sampling.max_tokens
        count = 26 if most is None else most
        encode = self.loaded.tokenizer.encode
        scored = [ScoredToken(request.prompt[0])]
        scored += [ScoredToken(i, -1.5, ((i, -1.5), (5, -2.0))) for i in request.prompt[1:]]
        for number in range(count):
            (token,) = encode(chr(ord("a") + number % 26))
            with_prompt = request.score_prompt and number == 0
            yield Piece(
                text=chr(ord("a") + number % 26),
                tokens=(score(request, token),),
                prompt=tuple(scored) if with_prompt else (),
                outcome=outcome(request, count, "length") if number == count - 1 else None,
            )
        if count == 0:
            embedding = (0.6, 0.8) if request.embed else None
            yield Piece(
                prompt=tuple(scored) if request.score_prompt else (),
                embedding=embedding,
                outcome=outcome(request, 0, "length"),
            )

    def endless(self, request: Request) -> Iterator[Piece]:
        """One piece, then nothing until it is released or cancelled."""
        yield Piece(text="a", tokens=(ScoredToken(70),))
        while not self.released.wait(0.01):
            if len(self.cancelled):
                yield Piece()
        yield Piece(text="z", tokens=(ScoredToken(71),), outcome=outcome(request, 2, "stop"))


def score(request: Request, token: int) -> ScoredToken:
    if request.top_logprobs is None:
        return ScoredToken(token)
    top = ((40, -0.5), (41, -0.75), (42, -3.0))[: request.top_logprobs]
    return ScoredToken(token, -1.0, top)


def outcome(request: Request, drawn: int, reason: Any, **given: Any) -> Outcome:
    return Outcome(
        finish_reason=reason,
        prompt_tokens=len(request.prompt),
        cached_tokens=given.pop("cached", 0),
        drawn_tokens=drawn,
        waited_seconds=0.0,
        prompt_seconds=0.5,
        drawing_seconds=0.25,
        **given,
    )


@dataclass
class Running:
    url: str
    port: int
    state: ServerState
    server: Server

    def client(self, key: str = "none", **given: Any) -> openai.OpenAI:
        plain = httpx.Client(verify=False, trust_env=False)  # to read no certificates
        given = {"max_retries": 0, "timeout": 20, "http_client": plain} | given
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **given)


def make_state(
    engine: Any, keys: Sequence[str] = (), settings: ServeConfig | None = None, **limits: Any
) -> ServerState:
    bounds = replace(ServerLimits(comment_seconds=5.0), **limits)
    state = ServerState(settings=settings or ServeConfig(), keys=Keys(keys), limits=bounds)
    if engine is not None:
        state.served = Served(
            name="model",
            created=1,
            engine=cast(Engine, engine),
            limits=bounds,
            parameters=12,
        )
        state.metrics.watch_engine(engine)
    return state


@contextmanager
def running(engine: Any, **given: Any) -> Iterator[Running]:
    """A server over this engine, listening on a free port."""
    state = make_state(engine, **given)
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    server = Server(state, cast(Loading, SimpleNamespace(error=None)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield Running(f"http://127.0.0.1:{port}", port, state, server)
    finally:
        server.config.timeout_graceful_shutdown = 0
        server.should_exit = server.force_exit = True
        thread.join(10)
        assert not thread.is_alive()
