"""From seconds of steps to hours on the clock: failures, checkpoints, evaluation and the rest.

The hazard belongs to the operator more than to the chip, so it is a factor of its own with a wide
spread (`facts/costs.toml`, `hours_between_failures`); it and the speed move time, energy and
dollars together.
"""

import math
from dataclasses import dataclass

import numpy as np

from lascaux.config.schema import Config
from lascaux.errors import ConfigError
from lascaux.model.accounting import checkpoint_bytes, count_parameters
from lascaux.planner.facts import read_facts
from lascaux.planner.job import Job
from lascaux.planner.uncertainty import Z90, Draws, Samples

RESTART_HOURS = (0.3, 6.0)
"""90 % interval: noticing, replacing what broke, loading, warming up. OPT-175B lost 23 days in some
90 restarts, 6 hours each; BLOOM's deadlocks took 6 to 11
"""
DISK_BYTES_PER_SECOND = (3e8, 3e9)
"""90 % interval, of one node's writes"""
SAMPLING_SHARE = 0.3
"""of the memory's bandwidth that generating a token at a time reaches"""
NEVER = 20.0
"""a run that takes so many times its steps is not planned"""
OTHER_LOSS_LN_SD = 0.7
STARTING_SECONDS = {"CPU": (5.0, 20.0), "GPU": (20.0, 180.0)}
"""90 % interval: loading code, data and the first, slower steps"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Goodput:
    """How the wall time of a run comes about; arrays over the draws."""

    nominal_hours: Samples
    """steps alone"""
    evaluation_hours: Samples
    saving_hours: Samples
    starting_hours: Samples
    lost_hours: Samples
    """work done again and restarts"""
    other_hours: Samples
    """slow devices, deadlocks, batch ramps, waiting"""
    failures: Samples
    best_interval_steps: float
    """steps between checkpoints after Young and Daly: sqrt(2 x stall x time between failures), and
    no fewer than one takes to write"""

    @property
    def wall_hours(self) -> Samples:
        """All of it."""
        return self.training_hours + self.starting_hours

    @property
    def training_hours(self) -> Samples:
        """From the first step to the last checkpoint."""
        return (
            self.nominal_hours
            + self.evaluation_hours
            + self.saving_hours
            + self.lost_hours
            + self.other_hours
        )


def goodput(job: Job, step_seconds: Samples, draws: Draws) -> Goodput:
    """Wall time of a run whose steps take these seconds."""
    config, devices = job.config, job.devices
    nominal = job.num_steps * step_seconds / 3600
    evaluation = _evaluation_fraction(config, job.num_steps) * nominal + _sampling_hours(job)
    save_seconds = _save_seconds(job, draws)
    saves = math.ceil(job.num_steps / config.checkpoint.every_steps)
    stalls = 0.1 if config.checkpoint.background else 1.0
    saving = ((saves - 1) * stalls + 1) * save_seconds / 3600  # the run ends with the last one
    hours_between = _hours_between_failures(config, draws) / devices
    interval = np.minimum(config.checkpoint.every_steps, job.num_steps) * step_seconds / 3600
    restart = draws.lognormal90("restart", *RESTART_HOURS)
    kind = "CPU" if job.device.vendor == "CPU" else "GPU"
    if kind == "CPU":
        hours_between = hours_between * 10  # a machine of one's own is not a cluster
    per_interval = (hours_between + restart) * np.expm1(np.minimum(interval / hours_between, 50))
    busy = nominal + evaluation + saving
    lost = busy * np.maximum(per_interval / interval - 1, 0)
    other = busy * _other_fraction(devices, draws)
    save_hours, between = float(np.median(save_seconds)) / 3600, float(np.median(hours_between))
    best = max(math.sqrt(2 * stalls * save_hours * between), save_hours)
    best_steps = best * 3600 / float(np.median(step_seconds))
    factor = float(np.median(per_interval / interval))
    if factor > NEVER:
        raise ConfigError(
            f"with a failure every {between:.3g} hours and a checkpoint every "
            f"{float(np.median(interval)):.3g} the run would take {factor:,.0f} times its steps; "
            f"try --checkpoint.every_steps={max(1, round(best_steps))}"
        )
    return Goodput(
        nominal_hours=nominal,
        evaluation_hours=evaluation,
        saving_hours=saving,
        starting_hours=draws.lognormal90("starting", *STARTING_SECONDS[kind]) / 3600,
        lost_hours=lost,
        other_hours=other,
        failures=(busy + lost) / hours_between,
        best_interval_steps=best_steps,
    )


def _evaluation_fraction(config: Config, num_steps: int) -> float:
    """Forward passes of validation, a third of the work of training, beside the steps."""
    evaluate, batch = config.evaluate, config.train.batch_tokens
    times = num_steps / evaluate.every_steps if evaluate.every_steps else 0.0
    tokens = times * evaluate.max_tokens + (evaluate.final_max_tokens or evaluate.max_tokens)
    return tokens / 3 / (num_steps * batch)


def _sampling_hours(job: Job) -> float:
    """Texts continued at every validation, a token for each reading of the weights."""
    evaluate = job.config.evaluate
    if job.devices > 1:
        return 0.0
    every = evaluate.every_steps or job.num_steps
    tokens = (
        math.ceil(job.num_steps / every) * len(evaluate.sample_prompts) * evaluate.sample_tokens
    )
    weights = 4 * count_parameters(job.config.model).total
    rate = SAMPLING_SHARE * job.device.bandwidth_bytes_per_second
    return tokens * weights / rate / 3600


def _save_seconds(job: Job, draws: Draws) -> Samples:
    hosts = max(1, job.devices // job.device.devices_per_host)
    num_bytes = checkpoint_bytes(job.config.model, job.config.optimizer.name)
    return num_bytes / (hosts * draws.lognormal90("disk", *DISK_BYTES_PER_SECOND))


def _hours_between_failures(config: Config, draws: Draws) -> Samples:
    """Device-hours between failures that stop a run: what was stated, else what others saw."""
    stated = config.plan.device_hours_between_failures
    if stated is not None:
        return draws.lognormal90("failures", stated / 2, stated * 2)
    seen = [math.log(row["device_hours"]) for row in read_facts("costs")["hours_between_failures"]]
    middle = math.exp(sum(seen) / len(seen))
    spread = (max(seen) - min(seen)) / Z90  # two operators show about half of the 90 % range
    return draws.lognormal("failures", middle, spread)


def _other_fraction(devices: int, draws: Draws) -> Samples:
    """What no hazard explains, growing with the machine, to the goodput of PaLM and BLOOM."""
    median = 0.02 + 0.01 * max(0.0, math.log2(devices / 8))
    return draws.lognormal("interruptions", median, OTHER_LOSS_LN_SD)
