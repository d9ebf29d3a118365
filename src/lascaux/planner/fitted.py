"""The fitted table, `facts/fitted.toml`: what `calibration.py` learned from the rows of `facts/`.

`python benchmarks/fit_planner.py` writes it; a test holds it against a fit made anew.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from lascaux.planner.calibration import (
    UNKNOWN,
    Calibration,
    Residual,
    Row,
    Spread,
    fit,
    fit_effects,
)
from lascaux.planner.devices import Device
from lascaux.planner.facts import read_facts
from lascaux.planner.memory import beside_bench_bytes, worst_ledger
from lascaux.planner.runs import PublishedRun, measured_step_seconds, published_runs
from lascaux.planner.work import Constants

GPU_START = Constants()
CPU_START = Constants(
    product_share=0.97, traffic_passes=17.0, tile_penalty=0.05, seconds_per_layer=2.5e-3
)
"""eager kernels on a processor are bound by work of their own, not by the memory bus alone"""
OTHER_PROCESSOR_LN_SD = 0.2
"""of another processor than the one that was measured, an assumption"""
LEAST_MEMORY_LN_SD = 0.1
"""between stacks, of which only two have measured memory, an assumption"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """Everything the planner learned."""

    gpu: Calibration
    cpu: Calibration
    memory: Calibration

    def constants(self, device: Device) -> Constants:
        """Of the step, on this kind of device."""
        return (self.cpu if device.vendor == "CPU" else self.gpu).constants

    def speed(self, stack: str, device: Device) -> Spread:
        """ln(seconds / predicted) of a stack on a device."""
        if device.vendor == "CPU":
            known = self.cpu.predict("lascaux", "cpu")
            return Spread(mean=known.mean, sd=math.hypot(known.sd, OTHER_PROCESSOR_LN_SD))
        known_stacks = {name for name, _ in self.gpu.effects}
        return self.gpu.predict(stack if stack in known_stacks else UNKNOWN, device.generation)

    def memory_ratio(self, stack: str, device: Device) -> Spread:
        """ln(bytes / ledger) of a stack on a device."""
        where = "cpu" if device.vendor == "CPU" else "gpu"
        return self.memory.predict(
            stack if (stack, where) in self.memory.effects else UNKNOWN, where
        )

    def stacks(self) -> list[str]:
        """Names that `plan.stack` may have beside `lascaux` and `unknown`."""
        return sorted({name for name, _ in self.gpu.effects})


@cache
def fitted() -> Fitted:
    """The table as it ships."""
    table = read_facts("fitted")
    return Fitted(**{name: _read(table[name]) for name in ("gpu", "cpu", "memory")})


def fit_all() -> Fitted:
    """The same from the rows."""
    rows = time_rows()
    return Fitted(
        gpu=fit([row for row in rows if row.generation != "cpu"], GPU_START),
        cpu=fit([row for row in rows if row.generation == "cpu"], CPU_START),
        memory=fit_memory(memory_residuals()),
    )


def fit_memory(residuals: Sequence[Residual]) -> Calibration:
    """Effects and spreads of ln(measured / ledger); memory has no constants."""
    found = fit_effects(residuals, GPU_START)
    spread = max(found.stack_sd, LEAST_MEMORY_LN_SD)
    return Calibration(**{**_fields(found), "stack_sd": spread})


def _fields(calibration: Calibration) -> dict[str, Any]:
    return {name: getattr(calibration, name) for name in calibration.__slots__}


def time_rows() -> list[Row]:
    """Every published run whose step time is known and can be planned."""
    rows = []
    for run in published_runs():
        seconds, job = measured_step_seconds(run), run.job
        if seconds is not None and job is not None:
            generation = "cpu" if job.device.vendor == "CPU" else job.device.generation
            rows.append(Row(run.name, run.stack, generation, shape_of(run), job, seconds))
    return rows


def memory_residuals() -> list[Residual]:
    """ln(measured / ledger) of every run whose memory was measured."""
    found = []
    for run in published_runs():
        job = run.job
        if job is not None and "memory_gib" in run.published:
            _, ledger = worst_ledger(job)
            where = "cpu" if job.device.vendor == "CPU" else "gpu"
            measured = run.published["memory_gib"] * 2**30
            measured += beside_bench_bytes(job) if where == "cpu" else 0
            value = math.log(measured / ledger.total)
            found.append(Residual(run.name, run.stack, where, shape_of(run), value))
    return found


def shape_of(run: PublishedRun) -> tuple[int, ...]:
    """What makes two rows of a stack near copies of each other: layers and widths."""
    job = run.job
    assert job is not None
    model, train = job.config.model, job.config.train
    if job.device.vendor == "CPU":
        return model.num_layers, model.d_model, model.vocab_size, train.seq_len
    return model.num_layers, model.d_model


def _read(table: dict[str, Any]) -> Calibration:
    effects = {
        (row["stack"], row["generation"]): (row["mean"], row["shapes"]) for row in table["effect"]
    }
    return Calibration(
        constants=Constants(**table["constants"]),
        mean=table["mean"],
        stack_sd=table["stack_sd"],
        shape_sd=table["shape_sd"],
        row_sd=table["row_sd"],
        effects=effects,
    )


def to_toml(found: Fitted) -> str:
    """The table as text."""
    lines = [
        "# Fitted to runs.toml and own_runs.toml by `python benchmarks/fit_planner.py`.",
        "# Means and spreads are of ln(measured / predicted): seconds (gpu, cpu), bytes (memory).",
    ]
    for name in ("gpu", "cpu", "memory"):
        part: Calibration = getattr(found, name)
        lines += ["", f"[{name}]"]
        lines += [f"{key} = {getattr(part, key):.4f}" for key in ("mean", "stack_sd")]
        lines += [f"{key} = {getattr(part, key):.4f}" for key in ("shape_sd", "row_sd")]
        lines += [f"[{name}.constants]"]
        lines += [f"{key} = {value:.4g}" for key, value in asdict(part.constants).items()]
        for (stack, generation), (mean, shapes) in sorted(part.effects.items()):
            lines += [f"[[{name}.effect]]", f'stack = "{stack}"', f'generation = "{generation}"']
            lines += [f"mean = {mean:.4f}", f"shapes = {shapes}"]
    return "\n".join(lines) + "\n"
