"""A plan as a person reads it: one screen, every figure with its interval and convention."""

import math
from dataclasses import dataclass

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lascaux.planner.figures import driven, sources, train_settings, unexplained, utilization
from lascaux.planner.machine import is_busy
from lascaux.planner.plan import Plan
from lascaux.planner.uncertainty import Samples, interval_of
from lascaux.units import (
    format_bytes,
    format_count,
    format_percent,
)

Units = tuple["Unit", ...]
SHOWN_LAYOUTS, WIDE = 5, 100
LEAST_SHARE = 0.05
WORDS = {
    "speed": "speed of the steps",
    "failures": "failures",
    "network": "network cards a collective uses",
    "interruptions": "waits and slow devices",
    "restart": "restarts",
    "starting": "starting up",
    "disk": "writing checkpoints",
    "price": "the price of an hour",
    "power": "the draw of a device",
    "pue": "the building",
    "grid": "the grid",
}
REMEDIES = {
    "failures": "--plan.device_hours_between_failures from your operator",
    "price": "an offer: --plan.price_usd_per_device_hour and --plan.price_date",
    "power": "--plan.power_watts, measured",
}
LEDGER_WORDS = {
    "on_demand": "rented by the hour",
    "committed": "committed, 3 years",
    "amortised": "owned, amortised",
    "purchase": "buying the cluster",
}


@dataclass(frozen=True, slots=True)
class Unit:
    """A row of one unit: the numbers of all columns are divided alike."""

    scale: float
    name: str
    prefix: str = ""

    def number(self, value: float) -> str:
        """Three digits that count: '1,204', '38.7', '0.42'."""
        scaled = value / self.scale
        digits = 0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2
        return f"{scaled:,.{digits}f}" if scaled >= 0.095 else f"{scaled:.2g}"

    def full(self, value: float) -> str:
        """With its unit."""
        space = "" if self.name.startswith(" ") or not self.name else " "
        return f"{self.prefix}{self.number(value)}{space}{self.name}"


TIME = (Unit(1e-3, "ms"), Unit(1.0, "s"), Unit(60.0, "min"), Unit(3600.0, "h"), Unit(86400.0, "d"))
BYTES = (Unit(2.0**20, "MiB"), Unit(2.0**30, "GiB"))
COUNT = (Unit(1.0, ""), Unit(1e6, "M"))
PERCENT = (Unit(1.0, "%"),)
ENERGY = (Unit(1.0, "kWh"), Unit(1e3, "MWh"), Unit(1e6, "GWh"))
MASS = (Unit(1.0, "kg"), Unit(1e3, "t"))
USD = (Unit(1.0, "", "$"), Unit(1e3, "k", "$"), Unit(1e6, "M", "$"), Unit(1e9, "G", "$"))


def print_plan(plan: Plan, why: bool, console: Console | None = None) -> None:
    """The plan to stdout, as wide as the terminal."""
    console = console or Console(emoji=False, highlight=False)
    console.print(render_plan(plan, why, wide=console.width >= WIDE))


def render_plan(plan: Plan, why: bool, wide: bool = True) -> RenderableType:
    """Head, table, what the width comes from, layouts, and with `why` the chain of figures."""
    parts: list[RenderableType] = [_head(plan), "", *_table(plan, wide), "", *_widths(plan)]
    if plan.candidates:
        settings = " ".join(train_settings(plan.candidates[0].job))
        parts += ["", _layouts(plan, wide), "", Text(f"the first: {settings}", style="dim")]
    if why:
        parts += ["", _why(plan)]
    return Group(*parts)


def unit_of(units: Units, value: float) -> Unit:
    """The largest unit of which there is at least one, else the smallest."""
    fitting = [unit for unit in units if value >= 0.9995 * unit.scale]
    return fitting[-1] if fitting else units[0]


def format_in(units: Units, value: float) -> str:
    """A single figure with the unit that suits it."""
    return unit_of(units, value).full(value)


def _head(plan: Plan) -> Text:
    job, train = plan.job, plan.job.config.train
    total, active = plan.parameters
    parameters = f"{format_count(total)} parameters"
    if active != total:
        parameters += f" ({format_count(active)} active)"
    kept = {"none": "nothing recomputed", "full": "blocks recomputed"}
    device = job.device.id
    if job.device.vendor == "CPU":
        device = "this machine" if job.devices == 1 else "processes of this machine"
    lines = [
        f"{parameters} · {format_count(job.tokens)} tokens in {job.num_steps:,} steps of "
        f"{format_count(train.batch_tokens)} · {plan.training_flops:.3g} FLOPs",
        f"{job.devices:,} x {device} · {job.layout.describe()} · micro-batch "
        f"{train.microbatch_seqs} x {train.seq_len:,} · "
        f"{kept.get(job.recompute, 'attention recomputed')} · {job.precision}"
        + (f" · stack {job.stack}" if job.stack != "lascaux" else ""),
    ]
    if plan.searched:
        lines.append(
            f"the fastest of {len(plan.candidates)} layouts that fit with 98 %: axes, micro-batch "
            "and recomputation are chosen here"
        )
    if job.device.vendor == "CPU" and is_busy():
        lines.append("this machine is busy: plan again, or with --probe, when it is idle")
    if plan.asked_batch_tokens != train.batch_tokens:
        lines.append(
            f"the batch of {plan.asked_batch_tokens:,} tokens is rounded to {train.batch_tokens:,} "
            "to divide over the devices"
        )
    head = Text("\n".join([*lines, ""]))
    if plan.fits_probability < 0.5:
        advice = "" if plan.candidates else f"; try {_larger(plan)}"
        head.append(f"it does not fit{advice}", style="bold red")
    else:
        head.append(_summary(plan), style="bold")
    return head


def _summary(plan: Plan) -> str:
    """Time and money in a line, in the middle and to be safe."""
    hours = interval_of(3600 * plan.goodput.wall_hours)
    middle, safe = format_in(TIME, hours.p50), format_in(TIME, hours.p95)
    on_demand = plan.bill.cost_usd["on_demand"]
    if on_demand is not None:
        dollars = interval_of(on_demand)
        middle += f" and {format_in(USD, dollars.p50)}"
        safe += f" and {format_in(USD, dollars.p95)}"
    return f"about {middle}; to be safe reckon with {safe}"


def _larger(plan: Plan) -> str:
    """What would have room."""
    if plan.job.device.vendor == "CPU":
        return "a larger machine (--device)"
    needed = plan.ledger.total * plan.job.devices / plan.job.device.memory_bytes
    return f"--devices {2 ** math.ceil(math.log2(max(2.0, 1.3 * needed)))}, without --parallel.…"


def _table(plan: Plan, wide: bool) -> list[RenderableType]:
    """The figures; where the terminal is narrow their notes stand below."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("", no_wrap=True)
    for head in ("middle", "one time of two", "nine of ten"):
        table.add_column(head, justify="right", no_wrap=True)
    if wide:
        table.add_column("")
    notes: list[RenderableType] = []
    job, hours = plan.job, plan.goodput
    peak = "measured" if job.device.vendor == "CPU" else "published"
    tokens = job.config.train.batch_tokens / plan.step_seconds / job.devices
    room = f"of {format_bytes(job.device.memory_bytes)}; fits with {_probability(plan)}"
    nominal = format_in(TIME, 3600 * float(np.median(hours.nominal_hours)))
    rows: list[tuple[str, Samples | None, Units, str]] = [
        ("memory, worst device", plan.memory, BYTES, room),
        ("step", plan.step_seconds, TIME, ""),
        ("tokens/s a device", tokens, COUNT, ""),
        ("MFU", 100 * utilization(plan), PERCENT, f"6N + 12LdT over the {peak} peak"),
        ("wall time", 3600 * hours.wall_hours, TIME, f"{nominal} without any loss"),
    ]
    if job.devices > 1:
        rows.append(("device-hours", plan.device_hours, COUNT, ""))
    rows += [
        ("energy", plan.bill.energy_kwh, ENERGY, ""),
        ("CO2", plan.bill.co2_kg, MASS, ""),
    ]
    on_demand = plan.bill.cost_usd["on_demand"]
    for name, words in LEDGER_WORDS.items():
        note = price_note(plan) if name == "on_demand" else ""
        rows.append((words, plan.bill.cost_usd[name], USD, note))
    if on_demand is not None:
        project = on_demand * plan.project_factor + (job.config.plan.staff_usd or 0.0)
        note = f"x{float(np.median(plan.project_factor)):.1f} for experiments and failed runs"
        rows.append(("the project, rented", project, USD, note))
    for label, samples, units, note in rows:
        if samples is not None:
            beside = [Text(note, style="dim")] if wide else []
            table.add_row(label, *_cells(samples, units), *beside)
            if note and not wide:
                notes.append(Text(f"{label}: {note}", style="dim"))
    return [table, *notes]


def _cells(samples: Samples, units: Units) -> tuple[str, str, str]:
    found = interval_of(samples)
    unit = unit_of(units, found.p50)
    return (
        unit.full(found.p50),
        f"{unit.number(found.p25)} to {unit.number(found.p75)}",
        f"{unit.number(found.p5)} to {unit.number(found.p95)}",
    )


def _probability(plan: Plan) -> str:
    value = plan.fits_probability
    if value > 0.9995:
        return "> 99.9 %"
    return "< 0.1 %" if value < 0.0005 else format_percent(value)


def price_note(plan: Plan) -> str:
    """The price and its year, without its source."""
    source = plan.bill.sources.get("price", "")
    return source.split(":")[0]


def _widths(plan: Plan) -> list[Text]:
    """What the width of time and money comes from, and what to do about it."""
    lines = []
    for name, samples in driven(plan).items():
        if name not in ("wall_hours", "cost_usd"):
            continue
        found = plan.drivers(samples)
        shares = [
            f"{round(100 * share)} % {WORDS.get(factor, factor)}"
            for factor, share in found.items()
            if share >= LEAST_SHARE
        ]
        label = {"wall_hours": "width of the time: ", "cost_usd": "width of the price:"}[name]
        remedy = _remedy(plan, next(iter(found), ""))
        narrower = f" (narrower with {remedy})" if remedy else ""
        lines.append(Text(f"{label} {', '.join(shares)}{narrower}"))
    configured = plan.job.config.checkpoint.every_steps
    best = plan.goodput.best_interval_steps
    fails = float(np.median(plan.goodput.failures)) >= 1
    if fails and plan.job.num_steps > configured and not 1 / 3 < configured / best < 3:
        lines.append(
            Text(
                f"checkpoints every {configured:,} steps; every {max(1, round(best)):,} would lose "
                "least (Young and Daly)"
            )
        )
    lines += [Text(words) for words in _unknown(plan)]
    budget = plan.job.config.plan.budget_usd
    on_demand = plan.bill.cost_usd["on_demand"]
    if budget is not None and on_demand is not None:
        kept = format_percent(float(np.mean(on_demand <= budget)))
        tokens = plan.job.tokens * budget / float(np.median(on_demand))
        lines.append(
            Text(
                f"the budget of {format_in(USD, budget)} is kept with {kept}; in the middle it "
                f"buys {format_count(tokens)} tokens"
            )
        )
    return lines


def _remedy(plan: Plan, factor: str) -> str | None:
    """What would make the widest factor narrower, if anything is left to do."""
    if factor != "speed":
        return REMEDIES.get(factor)
    if plan.job.config.plan.device is not None:
        return "--plan.stack, or a run on that hardware"
    return None if "this model" in plan.speed_source else "--probe"


def _unknown(plan: Plan) -> list[str]:
    """What could not be said, and what to give for it; what would have to be done to fit."""
    missing = plan.bill.missing
    lines = []
    if plan.job.device.vendor == "CPU":
        asked = {
            "energy_kwh": "--plan.power_watts",
            "on_demand": "--plan.price_usd_per_device_hour",
        }
        flags = [flag for key, flag in asked.items() if key in missing]
        if flags:
            lines.append(f"energy and dollars of a machine of your own: {' and '.join(flags)}")
    else:
        lines += [f"not known: {words}" for words in dict.fromkeys(missing.values())]
    return lines


def _layouts(plan: Plan, wide: bool) -> Table:
    """The fastest layouts; hours, dollars and energy grow with the step as those of the plan."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("layouts that fit")
    heads = ("micro-batch", "memory", "step", "rented", "recompute", "wall time", "energy")
    for head in heads if wide else heads[:4]:
        table.add_column(head, justify="right", no_wrap=True)
    planned = plan.seconds.total
    middle = {
        "hours": float(np.median(plan.goodput.wall_hours)),
        "step": float(np.median(plan.step_seconds)),
        "memory": float(np.median(plan.memory)) / plan.ledger.total,
    }
    on_demand, energy = plan.bill.cost_usd["on_demand"], plan.bill.energy_kwh
    for each in plan.candidates[:SHOWN_LAYOUTS]:
        ratio = each.seconds.total / planned
        cells = (
            str(each.job.config.train.microbatch_seqs),
            format_in(BYTES, each.ledger.total * middle["memory"]),
            format_in(TIME, ratio * middle["step"]),
            "?" if on_demand is None else format_in(USD, ratio * float(np.median(on_demand))),
            each.job.recompute,
            format_in(TIME, 3600 * ratio * middle["hours"]),
            "?" if energy is None else format_in(ENERGY, ratio * float(np.median(energy))),
        )
        table.add_row(each.job.layout.describe(), *(cells if wide else cells[:4]))
    return table


def _why(plan: Plan) -> Table:
    """Parts of memory and step, and what the figures rest on."""
    table = Table(box=None, pad_edge=False, show_header=False)
    kinds = plan.ledger.by_kind() | {"unexplained": unexplained(plan)}
    for name, value in kinds.items():
        table.add_row(f"memory: {name}", format_bytes(value) if value >= 1 else "0")
    for name in type(plan.seconds).__slots__:
        value = getattr(plan.seconds, name)
        if value > 0:
            share = value / plan.seconds.total
            words = name.replace("_", " ")
            table.add_row(f"step: {words}", f"{format_in(TIME, value)} ({100 * share:.0f} %)")
    learned = float(np.median(plan.step_seconds)) / plan.seconds.total
    table.add_row("step: learned factor", f"{learned:.2f}")
    goodput = plan.goodput
    for name in ("nominal", "evaluation", "saving", "starting", "lost", "other"):
        hours = float(np.median(getattr(goodput, f"{name}_hours")))
        table.add_row(f"time: {name}", format_in(TIME, 3600 * hours))
    table.add_row("time: failures", f"{float(np.median(goodput.failures)):.3g}")
    device = plan.job.device
    if plan.job.devices > 1:
        table.add_row("link: in a node", f"{device.link_bytes_per_second / 1e9:.3g} GB/s one way")
        between = f"{device.network_bytes_per_second / 1e9:.3g} GB/s a device"
        table.add_row("link: between nodes", between)
    for name, source in sources(plan).items():
        table.add_row(f"source: {name}", source)
    return table
