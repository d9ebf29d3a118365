"""`lascaux prove` from words to a verdict."""

import dataclasses

from rich.console import Console

from lascaux.config.schema import Config
from lascaux.errors import ConfigError
from lascaux.parallel.layout import AXES, Layout, resolve_layout
from lascaux.parallel.runtime import this_process
from lascaux.prove.describe import (
    describe_dry_run,
    describe_proof,
    dry_run_json,
    proof_json,
)
from lascaux.prove.dry_run import dry_run
from lascaux.prove.processes import prove_here, prove_under_torchrun
from lascaux.prove.shrink import MOST_PROCESSES, shrink
from lascaux.train.machine import prepare_device


def run_prove(
    config: Config, processes: int | None, console: Console, as_json: bool
) -> tuple[object, bool]:
    """What to print, and whether the layout agrees with one process.

    Raises: ConfigError for a layout that does not fit.
    """
    process = this_process()
    if process.world_size > 1:
        return _on_started_processes(config, as_json)
    asked = asked_layout(config, processes)
    small, layout = shrink(config, asked)
    with console.status(f"training on {layout.world_size} processes, then on one"):
        proof = prove_here(small, layout)
    return proof_json(proof) if as_json else describe_proof(proof, asked), proof.agrees


def _on_started_processes(config: Config, as_json: bool) -> tuple[object, bool]:
    process = this_process()
    asked = resolve_layout(config, process.world_size)
    if asked.world_size > MOST_PROCESSES:
        raise ConfigError(
            f"a proof takes at most {MOST_PROCESSES} processes, and torchrun started "
            f"{process.world_size}; without torchrun it runs here, with every axis split in two"
        )
    device = prepare_device(config.train, process)
    small, layout = shrink(config, asked)
    proof = prove_under_torchrun(small, layout, process, device)
    if proof is None:
        return None, True
    return proof_json(proof) if as_json else describe_proof(proof, asked), proof.agrees


def run_dry(config: Config, processes: int | None, console: Console, as_json: bool) -> object:
    """What to print of a dry run."""
    layout = asked_layout(config, processes)
    if config.train.precision == "auto":
        train = dataclasses.replace(config.train, precision="bf16")
        config = dataclasses.replace(config, train=train)
    with console.status(f"building {layout.world_size:,} processes' parts"):
        held = dry_run(config, layout)
    if as_json:
        return dry_run_json(config, layout, held)
    return describe_dry_run(config, layout, held)


def asked_layout(config: Config, processes: int | None) -> Layout:
    """The layout on this many processes, or on as many as its axes need.

    Raises: ConfigError for one process, where nothing is split, and whatever does not fit.
    """
    needed = 1
    for axis in AXES:
        needed *= getattr(config.parallel, axis) or 1
    count = needed if processes is None else processes
    if count < 2:
        raise ConfigError(
            "this layout is one process, which there is nothing to compare with; ask for one, such "
            "as --parallel.tp=2 --parallel.pp=2, or for sharded data parallel with --processes 4"
        )
    return resolve_layout(config, count)
