"""Proves a layout on processes of this machine, or on those that torchrun started."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lascaux.config.schema import Config
from lascaux.parallel.layout import Layout
from lascaux.parallel.runtime import Process
from lascaux.parallel.world import connect
from lascaux.prove.forks import in_fresh_processes, on_ranks
from lascaux.prove.run import Comparison, Trained, compare, train_on_layout, train_on_one
from lascaux.prove.traffic import Table

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Proof:
    """What was trained, and how far it was from one process."""

    config: Config
    layout: Layout
    comparisons: list[Comparison]
    traffic: Table
    """the first process's collectives in one step"""

    @property
    def agrees(self) -> bool:
        """Whether the layout trains the same model."""
        return all(comparison.agrees for comparison in self.comparisons)


def prove_here(config: Config, layout: Layout) -> Proof:
    """Fork a process for each rank of a small configuration, and one that trains it alone."""
    results = on_ranks(layout.world_size, train_on_layout, config, layout, CPU)
    (one,) = in_fresh_processes(train_on_one, [(config, CPU)])
    return _proof(config, layout, results, one)


def prove_under_torchrun(
    config: Config, layout: Layout, process: Process, device: torch.device
) -> Proof | None:
    """The same on the processes of a job; the first one compares, the others return None."""
    connect(device, process, config.parallel.timeout_seconds)
    own = train_on_layout(process.rank, config, layout, device)
    gathered: list[Any] | None = [None] * layout.world_size if process.rank == 0 else None
    dist.gather_object(own, gathered)
    if gathered is None:
        return None
    return _proof(config, layout, gathered, train_on_one(config, device))


def _proof(
    config: Config, layout: Layout, results: list[list[Trained]], one: list[Trained]
) -> Proof:
    return Proof(config, layout, compare(config, results, one), results[0][0].traffic)
