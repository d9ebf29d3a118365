"""Runs a function on several processes of this machine, forked, connected by gloo."""

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from lascaux.parallel.runtime import Process
from lascaux.parallel.world import connect

TIMEOUT_SECONDS = 60


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(rank, *arguments)` returned on each rank."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork does not survive a pool of threads
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        try:
            mp.start_processes(
                _run,
                args=(world_size, port, folder, function, arguments),
                nprocs=world_size,
                start_method="fork",
            )
        finally:
            torch.set_num_threads(threads)
        return [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=False)
            for rank in range(world_size)
        ]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _run(
    rank: int,
    world_size: int,
    port: int,
    folder: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    process = Process(rank=rank, world_size=world_size)
    connect(torch.device("cpu"), process, TIMEOUT_SECONDS)
    try:
        result = function(rank, *arguments)
    finally:
        torch.distributed.destroy_process_group()
    torch.save(result, Path(folder) / f"{rank}.pt")
