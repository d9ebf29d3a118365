"""The plan of a run: memory, time, energy, CO2 and dollars with their intervals.

One set of draws goes through the whole chain, `job` -> bytes and seconds -> hours -> energy ->
dollars, so every interval knows of the others. What each figure rests on is kept in `sources` for
`--why`.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from lascaux.config.schema import Config
from lascaux.errors import ConfigError, suggest
from lascaux.model.accounting import active_parameters, count_parameters, flops_per_token
from lascaux.parallel.layout import Layout
from lascaux.planner.calibration import UNKNOWN, Spread
from lascaux.planner.devices import Device, find_device, share_of
from lascaux.planner.fitted import Fitted, fitted
from lascaux.planner.goodput import Goodput, goodput
from lascaux.planner.job import Job, as_trained, make_job
from lascaux.planner.machine import is_busy, read_known, this_machine
from lascaux.planner.memory import Ledger, worst_ledger
from lascaux.planner.money import Bill, bill, experiment_factor
from lascaux.planner.search import FITS, Candidate, first_refusal, search
from lascaux.planner.uncertainty import Draws, Samples, normal_cdf, shares_of_spread
from lascaux.planner.work import StepSeconds, step_seconds

OWN_STACKS = ("lascaux", UNKNOWN)
BATCH_TOLERANCE = 0.05
"""how far a batch is rounded that hardly any data parallelism divides"""
NEAR = 32
"""how far around a number of devices others are looked for that work"""
SPLIT_ANYWAY = 8
"""devices that tensor or pipeline parallelism usually takes"""
SAME_WORK_LN_SD = 0.045
"""between two measurements of one model on one machine, whose speed drifts"""
BUSY_LN_SD = 0.3
"""of rates measured in a moment on a machine that others use"""
SAME_RUNS, OTHER_RUNS = 4, 8
"""the newest of which are heard"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything that was worked out; arrays over the draws."""

    job: Job
    searched: bool
    """the layout was chosen here, since the configuration has none"""
    candidates: tuple[Candidate, ...]
    pp_index: int
    ledger: Ledger
    memory: Samples
    seconds: StepSeconds
    step_seconds: Samples
    goodput: Goodput
    bill: Bill
    project_factor: Samples
    draws: Draws
    speed_source: str
    asked_batch_tokens: int
    """before it was rounded to divide over the devices"""

    @property
    def fits_probability(self) -> float:
        """That the worst device has room for everything."""
        return float(np.mean(self.memory <= self.job.device.memory_bytes))

    @property
    def device_hours(self) -> Samples:
        """Of all devices together."""
        return self.job.devices * self.goodput.wall_hours

    @property
    def training_flops(self) -> int:
        """6 N + 12 L d T for each token of the run."""
        train = self.job.config.train
        return flops_per_token(self.job.config.model, train.seq_len) * self.job.tokens

    @property
    def flops_per_step(self) -> int:
        """Of the model, recomputation not counted."""
        train = self.job.config.train
        return flops_per_token(self.job.config.model, train.seq_len) * train.batch_tokens

    @property
    def parameters(self) -> tuple[int, int]:
        """All, and those that a token uses."""
        model = self.job.config.model
        return count_parameters(model).total, active_parameters(model)

    def drivers(self, samples: Samples) -> dict[str, float]:
        """What the width of a quantity comes from."""
        return shares_of_spread(samples, self.draws.factors)


def make_plan(config: Config, device: Device | None = None) -> Plan:
    """The plan of a configuration, on `plan.device` or this machine.

    Where several devices are asked for and no axis is set, the fastest layout that fits is planned;
    a layout that was asked for is planned as it is, with what would fit beside it.

    Raises: ConfigError for an unknown device or stack, a layout that cannot be, a precision the
    device lacks.
    """
    table, config = fitted(), as_trained(config)
    settings = config.plan
    check_stack(settings.stack, table)
    device = device or (find_device(settings.device) if settings.device else this_machine())
    precision = resolve_precision(config, device)
    draws = Draws(settings.seed)

    def fits(job: Job, ledger: Ledger) -> float:
        return float(np.mean(memory_draws(job, ledger, table, draws) <= job.device.memory_bytes))

    devices, constants = settings.devices or named_devices(config), table.constants(device)
    if device.vendor == "CPU" and devices > 1:
        device = share_of(device, devices)
    if devices > 1 and not has_layout(config):
        seqs = config.train.batch_tokens // config.train.seq_len
        odd = seqs % max(1, devices // SPLIT_ANYWAY) != 0  # nothing much divides it
        tolerance = BATCH_TOLERANCE if odd else 0.0
        candidates = search(config, device, devices, precision, constants, fits, tolerance)
        if not candidates:
            raise ConfigError(explain_no_layout(config, device, devices, precision))
        plan = price(candidates[0].job, table, draws, candidates, searched=True)
        return replace(plan, asked_batch_tokens=config.train.batch_tokens)
    job = make_job(config, device, explicit_layout(config, devices), precision)
    plan = price(job, table, draws, [], searched=False)
    if plan.fits_probability >= FITS:
        return plan
    others = search(config, device, devices, precision, constants, fits)
    return replace(plan, candidates=tuple(others))


def plan_job(job: Job) -> Plan:
    """The plan of a job whose layout is settled."""
    return price(job, fitted(), Draws(job.config.plan.seed), [], searched=False)


def price(
    job: Job,
    table: Fitted,
    draws: Draws,
    candidates: list[Candidate],
    searched: bool,
) -> Plan:
    """The plan of a job."""
    config = job.config
    speed, speed_source = speed_of(job, table)
    pp_index, ledger = worst_ledger(job)
    memory = memory_draws(job, ledger, table, draws)
    parts = step_seconds(job, table.constants(job.device))
    slowness = speed.sd * draws.student4("speed")
    seconds = with_slow_network(job, table, parts, draws)
    steps = seconds * np.exp(speed.mean + slowness)
    steps = np.maximum(steps, least_step_seconds(job))
    hours = goodput(job, steps, draws)
    account = bill(
        config.plan, job.device, job.devices, job.devices * hours.wall_hours, slowness, draws
    )
    return Plan(
        job=job,
        searched=searched,
        candidates=tuple(candidates),
        pp_index=pp_index,
        ledger=ledger,
        memory=memory,
        seconds=parts,
        step_seconds=steps,
        goodput=hours,
        bill=account,
        project_factor=experiment_factor(config.plan, draws),
        draws=draws,
        speed_source=speed_source,
        asked_batch_tokens=config.train.batch_tokens,
    )


def with_slow_network(job: Job, table: Fitted, parts: StepSeconds, draws: Draws) -> Samples | float:
    """Seconds of the formulas; in half of the draws collectives use fewer network cards.

    Down to one for each device, as DeepSpeed's did in 2021, where others used all of a node.
    """
    one_card = replace(table.constants(job.device), networks_share=0.0)
    slow = step_seconds(job, one_card).total
    if slow < 1.01 * parts.total:
        return parts.total
    share = np.maximum(0.0, 2 * normal_cdf(draws.normal("network")) - 1)
    return parts.total + (slow - parts.total) * share


def least_step_seconds(job: Job) -> float:
    """A step at the whole peak: nothing is faster."""
    train = job.config.train
    flops = flops_per_token(job.config.model, train.seq_len) * train.batch_tokens
    return flops / (job.devices * job.device.peak(job.precision))


def speed_of(job: Job, table: Fitted) -> tuple[Spread, str]:
    """ln(step seconds / predicted), and what it was learned from."""
    spread = table.speed(job.stack, job.device)
    if job.device.vendor == "CPU":
        source = "steps of Lascaux on another processor"
    elif (job.stack, job.device.generation) in table.gpu.effects:
        source = f"measured steps of {job.stack} on {job.device.generation}"
    else:
        source = f"{len(table.gpu.effects)} stacks on other hardware or of other people"
    if job.config.plan.device is not None:
        return spread, source
    if "bf16 rate" in job.device.assumed and is_busy():
        spread = replace(spread, sd=math.hypot(spread.sd, BUSY_LN_SD))
    calibration = table.cpu if job.device.vendor == "CPU" else table.gpu
    inside = math.hypot(calibration.shape_sd, calibration.row_sd)
    same, others = earlier(job, "ln_ratio")
    narrowed = narrow(narrow(spread, others, inside), same, SAME_WORK_LN_SD)
    if same:
        source = f"{len(same)} measurements of this model on this machine"
    elif others:
        source = f"{len(others)} measurements of other models on this machine"
    return narrowed, source


def memory_draws(job: Job, ledger: Ledger, table: Fitted, draws: Draws) -> Samples:
    """Bytes of the worst device."""
    spread = memory_of(job, table)
    return ledger.total * np.exp(spread.mean + spread.sd * draws.student4("memory"))


def memory_of(job: Job, table: Fitted) -> Spread:
    """ln(bytes / ledger), learned from measured runs and from those on this machine."""
    spread = table.memory_ratio(job.stack, job.device)
    if job.config.plan.device is not None:
        return spread
    inside = math.hypot(table.memory.shape_sd, table.memory.row_sd)
    same, others = earlier(job, "memory_ln_ratio")
    return narrow(narrow(spread, others, inside), same, inside)


def earlier(job: Job, figure: str) -> tuple[list[float], list[float]]:
    """What runs on this machine took beside the formulas: the same work, and other work."""
    outcomes = [each for each in read_known().outcomes if each.precision == job.precision]
    same = [getattr(each, figure) for each in outcomes if each.work == job_key(job)]
    others = [getattr(each, figure) for each in outcomes if each.work != job_key(job)]
    return same[-SAME_RUNS:], others[-OTHER_RUNS:]


def narrow(spread: Spread, values: list[float], own: float) -> Spread:
    """The spread, drawn towards values that scatter by `own` around what is looked for."""
    if not values:
        return spread
    noise = own**2 / len(values)
    weight = spread.sd**2 / (spread.sd**2 + noise)
    mean = weight * sum(values) / len(values) + (1 - weight) * spread.mean
    return Spread(mean=mean, sd=math.sqrt(own**2 + weight * noise))


def job_key(job: Job) -> str:
    """What has to be the same for one run to tell of another."""
    model, train = job.config.model, job.config.train
    shape = f"{model.num_layers}x{model.d_model}x{model.ffn_width}x{model.vocab_rows}"
    batch = f"{train.batch_tokens}/{train.microbatch_seqs}x{train.seq_len}"
    settings = f"{model.num_experts}/{job.config.optimizer.name}/{job.recompute}"
    return f"{shape} {batch} {settings} {job.layout.describe()}"


def check_stack(stack: str, table: Fitted) -> None:
    """Raises: ConfigError for a stack without rows, with those that have some."""
    known = [*OWN_STACKS, *table.stacks()]
    if stack not in known:
        raise ConfigError(
            f"'plan.stack' {stack!r} is not known{suggest(stack, known)}; known: {', '.join(known)}"
        )


def resolve_precision(config: Config, device: Device) -> str:
    """What `train.precision` means on a device."""
    asked = config.train.precision
    if asked != "auto":
        device.peak(asked)
        return asked
    if "bf16" in device.peak_flops_per_second:
        return "bf16"
    if config.plan.stack != "lascaux" and "fp16" in device.peak_flops_per_second:
        return "fp16"
    return "fp32"


def has_layout(config: Config) -> bool:
    """Whether the configuration says how to split the model; a ZeRO stage alone shards it all."""
    if config.plan.zero is not None:
        return True
    parallel = config.parallel
    sizes = (parallel.dp_replicate, parallel.tp, parallel.cp, parallel.ep, parallel.pp)
    staged = parallel.virtual_pp > 1 or parallel.schedule != "1f1b"
    return parallel.dp_shard is not None or staged or any(size > 1 for size in sizes)


def named_devices(config: Config) -> int:
    """The product of the axes of a configuration."""
    parallel = config.parallel
    product = parallel.dp_replicate * parallel.tp * parallel.cp * parallel.pp
    return product * (parallel.dp_shard or 1)


def explicit_layout(config: Config, devices: int) -> Layout:
    """The layout that the configuration names, filled up with dp_shard.

    Raises: ConfigError where the axes do not make up the devices.
    """
    parallel = config.parallel
    others = parallel.dp_replicate * parallel.tp * parallel.cp * parallel.pp
    wanted = others * (parallel.dp_shard or 1)
    if devices % others or (parallel.dp_shard is not None and wanted != devices):
        raise ConfigError(
            f"the axes of [parallel] (dp_replicate {parallel.dp_replicate}, dp_shard "
            f"{parallel.dp_shard or 'unset'}, tp {parallel.tp}, cp {parallel.cp}, pp {parallel.pp})"
            f" multiply to {wanted}, which "
            + (f"is not --devices {devices}" if parallel.dp_shard else f"does not divide {devices}")
        )
    return Layout(
        pp=parallel.pp,
        dp_replicate=parallel.dp_replicate,
        dp_shard=parallel.dp_shard or devices // others,
        cp=parallel.cp,
        tp=parallel.tp,
        ep=parallel.ep,
    )


def explain_no_layout(config: Config, device: Device, devices: int, precision: str) -> str:
    """Why nothing is possible or fits, and what would help."""
    refusal = first_refusal(config, device, devices, precision)
    if refusal is not None:
        near = [
            number
            for number in range(max(1, devices - NEAR), devices + NEAR + 1)
            if first_refusal(config, device, number, precision) is None
        ]
        nearest = sorted(sorted(near, key=lambda number: abs(number - devices))[:3])
        hint = f"\nnumbers that work: {', '.join(map(str, nearest))}" if nearest else ""
        return f"no layout of {devices} {device.id} is possible: {refusal}{hint}"
    total = count_parameters(config.model).total
    return (
        f"no layout of {devices} {device.id} was found that fits with {100 * FITS:g} %: states of "
        f"{total / 1e9:.3g} B parameters take about {18 * total / devices / 2**30:.3g} GiB of the "
        f"{device.memory_bytes / 2**30:.3g} GiB each; take more devices, or set --parallel.… to "
        "see what a layout needs"
    )


def with_devices(config: Config, device: str | None, devices: int | None) -> Config:
    """The configuration with `--device` and `--devices`."""
    plan = config.plan
    return replace(
        config,
        plan=replace(
            plan,
            device=device if device is not None else plan.device,
            devices=devices if devices is not None else plan.devices,
        ),
    )
