"""The process a run lives in: the only place that reads and sets environment variables."""

import os
from dataclasses import dataclass
from pathlib import Path

SPINS_WHILE_WAITING = "1000"


@dataclass(frozen=True, slots=True)
class Process:
    """One of the processes that `torchrun` started, or the only one."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    processes_here: int = 1
    """processes on this machine"""


def this_process() -> Process:
    """What torchrun says of this process; without torchrun the only one."""
    read = os.environ.get
    return Process(
        rank=int(read("RANK", "0")),
        local_rank=int(read("LOCAL_RANK", "0")),
        world_size=int(read("WORLD_SIZE", "1")),
        processes_here=int(read("LOCAL_WORLD_SIZE", "1")),
    )


def meet_on_this_machine(port: int) -> None:
    """Have processes forked from this one find each other as torchrun's do."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def let_waiting_threads_sleep() -> None:
    """Have OpenMP's threads sleep soon while they wait, unless the user decided that.

    libgomp reads this when torch is imported, so it must be called before. Beside another busy
    process a step then takes 0.6 of the time, alone it costs about 1 % (docs/performance.md).
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS_WHILE_WAITING


def threads_asked_for() -> bool:
    """Whether the user set the number of threads, by which torch then goes.

    torchrun sets it to 1 for every process where the user has not.
    """
    return "OMP_NUM_THREADS" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ


def cache_folder() -> Path:
    """The user's folder for what can be lost: what was measured on this machine."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lascaux"
