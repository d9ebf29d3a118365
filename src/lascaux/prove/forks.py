"""Functions on forked processes of this machine: connected by gloo, or each on its own.

Forked, since torch is then there at once. Results come back through pipes and must hold no tensors.
"""

import signal
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lascaux.parallel.runtime import Process, meet_on_this_machine
from lascaux.parallel.world import connect

TIMEOUT_SECONDS = 120

T = TypeVar("T")


@contextmanager
def _one_thread() -> Iterator[int]:
    """A fork does not survive a pool of threads; gives how many there were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def in_fresh_processes(function: Callable[..., T], calls: Sequence[tuple[Any, ...]]) -> list[T]:
    """What `function` returns for each call, in a new process; one for each core at a time."""
    with _one_thread() as cores, get_context("fork").Pool(cores, _obey, maxtasksperchild=1) as pool:
        return pool.starmap(function, calls, chunksize=1)


def on_ranks(world_size: int, function: Callable[..., T], *arguments: Any) -> list[T]:
    """What `function(rank, *arguments)` returns on connected processes, by rank.

    Raises: RuntimeError with the first process's error, when one of them fails.
    """
    context = get_context("fork")
    workers: list[tuple[Any, Connection]] = []
    with _one_thread():
        meet_on_this_machine(_free_port())
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                work = (rank, world_size, sender, function, arguments)
                worker = context.Process(target=_work, args=work, daemon=True)
                worker.start()
                sender.close()
                workers.append((worker, receiver))
            return [_receive(rank, receiver) for rank, (_, receiver) in enumerate(workers)]
        finally:
            for worker, _ in workers:
                worker.terminate()
                worker.join()


def _obey() -> None:
    """Leave Ctrl-C to the parent, and end without a word when it says so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _work(
    rank: int,
    world_size: int,
    sender: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    _obey()
    connect(torch.device("cpu"), Process(rank=rank, world_size=world_size), TIMEOUT_SECONDS)
    try:
        sender.send((function(rank, *arguments), None))
    except Exception:
        sender.send((None, traceback.format_exc()))
    finally:
        dist.destroy_process_group()


def _receive(rank: int, receiver: Connection) -> Any:
    if not receiver.poll(2 * TIMEOUT_SECONDS):
        raise RuntimeError(f"process {rank} of the layout did not answer")
    try:
        result, failure = receiver.recv()
    except EOFError:
        raise RuntimeError(f"process {rank} of the layout ended without a word") from None
    if failure is not None:
        raise RuntimeError(f"process {rank} of the layout failed:\n{failure}")
    return result


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
