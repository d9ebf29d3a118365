"""The process a run lives in: the only place that reads and sets environment variables."""

import os

SPINS_WHILE_WAITING = "1000"


def let_waiting_threads_sleep() -> None:
    """Have OpenMP's threads sleep soon while they wait, unless the user decided that.

    libgomp reads this when torch is imported, so it must be called before. Beside another busy
    process a step then takes 0.6 of the time, alone it costs about 1 % (docs/performance.md).
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS_WHILE_WAITING


def threads_asked_for() -> bool:
    """Whether the user set the number of threads, by which torch then goes."""
    return "OMP_NUM_THREADS" in os.environ
