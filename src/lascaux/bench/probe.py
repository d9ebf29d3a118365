"""`lascaux plan --probe`: some steps of the model on this machine, kept for plans to come."""

import dataclasses
import math
from datetime import date

from rich.console import Console

from lascaux.bench.run import run_bench, shorten
from lascaux.bench.training import TrainingSpeed
from lascaux.config.schema import Config
from lascaux.errors import ConfigError
from lascaux.parallel.layout import Layout
from lascaux.planner.fitted import fitted
from lascaux.planner.job import make_job
from lascaux.planner.machine import Outcome, note_outcome, note_rates, this_machine
from lascaux.planner.memory import beside_bench_bytes, worst_ledger
from lascaux.planner.plan import has_layout, job_key
from lascaux.planner.work import step_seconds

ROUNDS = 9


def probe(config: Config, console: Console) -> None:
    """Measure steps, matrix products and memory, and note them for this machine.

    Raises: ConfigError where another device is planned for, several processes, or memory runs out.
    """
    if config.plan.device is not None:
        raise ConfigError(
            f"--probe measures this machine, and the plan is for {config.plan.device}; leave out "
            "--device, or run it where that device is"
        )
    if has_layout(config) or (config.plan.devices or 1) > 1:
        raise ConfigError(
            "--probe measures one process; leave out --devices and the axes of [parallel]"
        )
    speed = run_bench("train", config, ROUNDS, console)
    assert isinstance(speed, TrainingSpeed)
    note_rates(speed.peaks.matmul_flops_per_second, speed.peaks.bandwidth_bytes_per_second)
    device = this_machine()
    unwritten = dataclasses.replace(config.checkpoint, background=False)  # `bench` saves nothing
    measured = dataclasses.replace(shorten(config), checkpoint=unwritten)
    job = make_job(measured, device, Layout(), speed.precision)
    formula = step_seconds(job, fitted().constants(device)).total
    absent = beside_bench_bytes(job) if device.vendor == "CPU" else 0.0
    outcome = Outcome(
        work=job_key(make_job(config, device, Layout(), speed.precision)),
        precision=speed.precision,
        ln_ratio=math.log(speed.median_step_seconds / formula),
        memory_ln_ratio=math.log((speed.peak_memory_bytes + absent) / worst_ledger(job)[1].total),
        when=date.today().isoformat(),
    )
    note_outcome(outcome)
