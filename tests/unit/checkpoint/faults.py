"""System calls that fail, kill the process or end the world at a chosen moment."""

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

CALLS = (
    "open", "close", "write", "fsync", "mkdir", "rename", "unlink", "rmdir", "listdir", "scandir"
)  # fmt: skip

Reach = Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]


@contextmanager
def calls_go_through(reach: Reach) -> Iterator[None]:
    """Every call of CALLS asks `reach(name, real, arguments)` first; its result, if any, counts."""
    real = {name: getattr(os, name) for name in CALLS}

    def passing(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            answer = reach(name, real[name], arguments)
            return real[name](*arguments, **named) if answer is None else answer

        return call

    for name in CALLS:
        setattr(os, name, passing(name))
    try:
        yield
    finally:
        for name in CALLS:
            setattr(os, name, real[name])


class AtCall:
    """Does something at the k-th call, or from the k-th call on."""

    def __init__(self, k: int, action: Callable[[str], None], persists: bool = False) -> None:
        self.k, self.action, self.persists = k, action, persists
        self.count = 0

    def __call__(self, name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.count += 1
        if self.count == self.k or (self.persists and self.count > self.k):
            if name == "write":
                real(arguments[0], arguments[1][: len(arguments[1]) // 2])
            self.action(name)


class Crash(BaseException):
    """The process is gone: nothing that comes later happens, cleaning up included."""


def crash(name: str) -> None:
    raise Crash


def kill(name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def failing(number: int) -> Callable[[str], None]:
    def fail(name: str) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def in_child(function: Callable[[], None]) -> int:
    """Runs a function in a forked child; returns its pid.

    The function must not compute enough to start torch's threads: a child has none of them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside idle threads
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return pid
