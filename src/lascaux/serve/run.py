"""`lascaux serve`: listens at once, loads the model beside it, and ends when its work is done."""

import asyncio
import errno
import gc
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn
from rich.console import Console

from lascaux.config.serve_schema import ServeConfig
from lascaux.errors import ConfigError
from lascaux.generate.engine import Engine
from lascaux.generate.load import load_for_generation
from lascaux.generate.request import EngineOptions
from lascaux.model.accounting import count_parameters
from lascaux.serve.app import build_app
from lascaux.serve.connection import Connection
from lascaux.serve.keys import read_keys
from lascaux.serve.limits import ServerLimits
from lascaux.serve.served import Served
from lascaux.serve.settings import serve_settings, split_flags
from lascaux.serve.state import ServerState
from lascaux.units import format_bytes, format_count

HEAD_BYTES = 64 << 10
LAST_SECONDS = 5


def serve(
    source: Path,
    flags: Sequence[str],
    console: Console,
    *,
    port: int | None = None,
    limits: ServerLimits | None = None,
    report: Callable[[dict[str, object]], None] = lambda figures: None,
) -> None:
    """Serve a run until the process is told to stop.

    The first SIGTERM or SIGINT refuses new requests and finishes running ones, a second one stops
    at once. `report` gets the figures of the start.

    Raises: ConfigError, CheckpointError before anything listens; what loading raises.
    """
    serve_flags, generate_flags = split_flags(flags, port)
    settings = serve_settings(source, serve_flags)
    state = ServerState(
        settings=settings, keys=read_keys(settings), limits=limits or ServerLimits()
    )
    listener = listen(settings.host, settings.port)
    address = _address(settings.host, listener.getsockname()[1])
    console.print(
        f"loading {source}; {address}/health says when it is ready",
        highlight=False,
        soft_wrap=True,
    )
    loading = Loading(source, generate_flags, state)
    server = Server(state, loading)
    loading.start(lambda served: _announce(served, state, address, console, report))
    server.run(sockets=[listener])
    if loading.error is not None:
        raise loading.error
    if state.served is not None:
        state.served.engine.stop(0)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises: ConfigError where that is not possible."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"'serve.host' {host!r} is no address here: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} of {host} is in use; stop what listens there, or give another one: "
                "--port 0 takes any that is free"
            ) from None
        raise ConfigError(f"cannot listen on port {port} of {host}: {error.strerror}") from None
    return listener


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Loading:
    """Loads the model in a thread of its own, so that /health answers meanwhile."""

    def __init__(self, source: Path, flags: Sequence[str], state: ServerState) -> None:
        self._source, self._flags, self._state = source, flags, state
        self.error: Exception | None = None

    def start(self, done: Callable[[Served], None]) -> None:
        """Begin; `done` is called in that thread once requests can be answered."""
        threading.Thread(target=self._load, args=(done,), name="loading", daemon=True).start()

    def _load(self, done: Callable[[Served], None]) -> None:
        try:
            served = make_served(self._source, self._flags, self._state)
            gc.freeze()  # what is loaded stays, and need not be looked at again and again
            self._state.metrics.watch_engine(served.engine)
            served.engine.start()
            self._state.served = served
            done(served)
        except Exception as error:  # raised again by `serve`, in the main thread
            self.error = error


def make_served(source: Path, flags: Sequence[str], state: ServerState) -> Served:
    """The model of a run with an engine that is not yet started."""
    loaded = load_for_generation(source, flags)
    engine = Engine(loaded, engine_options(state.settings, loaded.settings.draft_tokens))
    served = Served(
        name=state.settings.model_name or loaded.name,
        created=int(time.time()),
        engine=engine,
        limits=state.limits,
        parameters=count_parameters(loaded.model.config).total,
    )
    _ = served.special_pattern, served.longest_token_bytes  # before the first request needs them
    return served


def engine_options(settings: ServeConfig, draft_tokens: int) -> EngineOptions:
    """How much the engine takes on."""
    return EngineOptions(
        max_streams=settings.max_streams,
        max_waiting=settings.max_waiting,
        cache_tokens=settings.cache_tokens,
        reuse_prefixes=settings.reuse_prefixes,
        draft_tokens=draft_tokens,
    )


def _announce(
    served: Served,
    state: ServerState,
    address: str,
    console: Console,
    report: Callable[[dict[str, object]], None],
) -> None:
    figures, loaded = served.engine.figures(), served.engine.loaded
    keys = "API keys are required" if state.keys else "no API key is needed"
    console.print(
        f"{address} serves {served.name}: {format_count(served.parameters)} parameters in "
        f"{loaded.precision}, {format_bytes(figures.weight_bytes)} of weights, "
        f"{format_bytes(figures.cache_bytes)} of cache; {keys}\nplayground: {address}/",
        highlight=False,
        soft_wrap=True,
    )
    report(
        {
            "url": address,
            "model": served.name,
            "parameters": served.parameters,
            "precision": loaded.precision,
            "weight_bytes": figures.weight_bytes,
            "cache_bytes": figures.cache_bytes,
            "needs_key": bool(state.keys),
        }
    )


class Server(uvicorn.Server):
    """uvicorn, which finishes its streams before it ends."""

    def __init__(self, state: ServerState, loading: Loading) -> None:
        limits = state.limits
        super().__init__(
            uvicorn.Config(
                build_app(state),
                http=partial(Connection, limits=limits),  # type: ignore[arg-type]
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=limits.idle_seconds,
                timeout_graceful_shutdown=LAST_SECONDS,
                h11_max_incomplete_event_size=HEAD_BYTES,
            )
        )
        self._state, self._loading = state, loading
        self._drains_until = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal: finish what runs; the second: end now."""
        if self._state.draining:
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # of tasks cut short
            self.config.timeout_graceful_shutdown = 0
            self.should_exit = self.force_exit = True
            return
        self._drains_until = time.monotonic() + self._state.limits.drain_seconds
        self._state.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Look ten times a second whether it is time to end."""
        if self._loading.error is not None:
            self.should_exit = True
        if self._state.draining:
            if self._state.running == 0:
                self.should_exit = True
            elif time.monotonic() > self._drains_until and self._state.served is not None:
                await asyncio.to_thread(self._state.served.engine.stop, 0)
                self.should_exit = True
        return await super().on_tick(counter)
