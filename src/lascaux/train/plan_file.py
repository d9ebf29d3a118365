"""RUN/plan.json: what was predicted before the first step, and how it turned out."""

import json
import math
import resource
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lascaux.config.schema import Config
from lascaux.errors import CheckpointError, ConfigError
from lascaux.parallel.layout import Layout
from lascaux.planner.devices import Device, processor, share_of
from lascaux.planner.figures import plan_figures
from lascaux.planner.job import make_job
from lascaux.planner.machine import (
    Outcome,
    copy_rate,
    gpu_device,
    is_busy,
    note_outcome,
    note_rates,
    read_known,
)
from lascaux.planner.plan import Plan, job_key, plan_job
from lascaux.train.machine import Machine
from lascaux.train.run_folder import read_records, write_atomically
from lascaux.units import format_bytes, format_duration

PLAN = "plan.json"


def write_plan(folder: Path, config: Config, machine: Machine, layout: Layout) -> str | None:
    """Write the plan of a run that begins, unless it has one; returns what to tell the user."""
    path = folder / PLAN
    if path.exists():
        return None
    plan = plan_here(config, machine, layout)
    if plan is None:
        return f"none: {machine.device_name} is not in the planner's table of devices"
    figures = plan_figures(plan)
    figures["formulas"] = {"step_seconds": plan.seconds.total, "bytes": plan.ledger.total}
    figures["work"] = job_key(plan.job)
    forget_peak_memory()
    write_atomically(path, json.dumps(figures, indent=1) + "\n")
    seconds, memory = figures["training_seconds"], figures["memory"]["per_device_bytes"]
    return (
        f"{format_duration(seconds['p50'])} of training (nine times of ten "
        f"{format_duration(seconds['p5'])} to {format_duration(seconds['p95'])}), "
        f"{format_bytes(memory['p50'])} of memory"
    )


def plan_here(config: Config, machine: Machine, layout: Layout) -> Plan | None:
    """The plan of a run on the machine it starts on, with the peak that was just measured."""
    device = _device(machine, layout.world_size)
    if device is None:
        return None
    return plan_job(make_job(config, device, layout, machine.precision))


def _device(machine: Machine, processes: int) -> Device | None:
    """A process's share of the machine; None for a GPU without a row."""
    if machine.device == "cuda":
        try:
            return gpu_device(machine.device_name)
        except ConfigError:
            return None
    peak = machine.matmul_peak_flops_per_second
    bandwidth = read_known().bandwidth_bytes_per_second or copy_rate()
    if has_it_all(machine) and processes == 1:
        note_rates({machine.precision: peak}, bandwidth)
    source = "the matrix product measured when the run started"
    here = processor({machine.precision: peak}, bandwidth, machine.memory_bytes, source)
    return share_of(here, processes)


def has_it_all(machine: Machine) -> bool:
    """Whether the run has every core, so that what it measures is what the machine can do."""
    return machine.device != "cpu" or machine.threads >= machine.cores


def note_end(folder: Path, device: torch.device, machine: Machine) -> str | None:
    """Write the outcome of a finished run beside its plan; returns the comparison in words."""
    path = folder / PLAN
    if not path.exists():
        return None
    try:
        figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        records = read_records(folder / "metrics.jsonl")
        if "outcome" in figures or not records:
            return None
        outcome = _outcome(figures, records, device)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); remove it, and the run ends without a comparison"
        ) from error
    figures["outcome"] = outcome
    write_atomically(path, json.dumps(figures, indent=1) + "\n")
    if not has_it_all(machine):
        return _compare(figures)
    ratio = math.log(outcome["step_seconds"] / figures["formulas"]["step_seconds"])
    memory = math.log(outcome["memory_bytes"] / figures["formulas"]["bytes"])
    note_outcome(Outcome(figures["work"], figures["precision"], ratio, memory, outcome["when"]))
    return _compare(figures)


def _outcome(
    figures: dict[str, Any], records: list[dict[str, Any]], device: torch.device
) -> dict[str, Any]:
    """What was measured, and whether the intervals hold it."""
    steps = [record["seconds"] for record in records]
    if device.type == "cuda":
        memory = float(torch.cuda.max_memory_reserved(device))
    else:
        memory = peak_memory_bytes()
    measured = {
        "step_seconds": median(steps),
        "training_seconds": records[-1]["elapsed_seconds"],
        "memory_bytes": memory,
    }
    planned = {
        "step_seconds": figures["step_seconds"],
        "training_seconds": figures["training_seconds"],
        "memory_bytes": figures["memory"]["per_device_bytes"],
    }
    inside = {
        key: bool(planned[key]["p5"] <= value <= planned[key]["p95"])
        for key, value in measured.items()
    }
    return {**measured, "inside_90": inside, "when": date.today().isoformat()}


def forget_peak_memory() -> None:
    """Have the kernel count the largest resident set anew: preparing data is not training."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # then the peak is that of the whole process, which is never less


def peak_memory_bytes() -> float:
    """The largest resident set of this process since `forget_peak_memory`."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(line for line in lines if line.startswith("VmHWM:"))
        return 1024.0 * int(peak.split()[1])
    except (OSError, StopIteration):
        return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _compare(figures: dict[str, Any]) -> str:
    """One line: time and memory, planned and taken."""
    outcome, planned = figures["outcome"], figures["training_seconds"]
    memory = figures["memory"]["per_device_bytes"]
    words = {True: "inside", False: "outside"}
    inside = outcome["inside_90"]
    if outcome["training_seconds"] > planned["p95"] and is_busy():
        words[False] = "outside: other processes keep the cores busy"
    return (
        f"{format_duration(outcome['training_seconds'])} of training, planned "
        f"{format_duration(planned['p5'])} to {format_duration(planned['p95'])} "
        f"({words[inside['training_seconds']]}); {format_bytes(outcome['memory_bytes'])} of "
        f"memory, planned {format_bytes(memory['p5'])} to {format_bytes(memory['p95'])} "
        f"({words[inside['memory_bytes']]})"
    )
