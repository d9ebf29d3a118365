"""What it costs to use a model, and when that passes what it cost to make.

Instances of devices (`serving.py`) are rented as the load asks, one at least; energy and dollars
are those of `money.py`. Facts: `facts/diffusion.toml`.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from lascaux.config.plan_schema import PlanConfig
from lascaux.errors import ConfigError
from lascaux.planner.capability import (
    count_text,
    draws_of_interval,
    fact_draws,
    find_fact,
    usd_text,
)
from lascaux.planner.devices import Device
from lascaux.planner.facts import read_facts
from lascaux.planner.money import bill, experiment_factor
from lascaux.planner.replication import training_utilization
from lascaux.planner.serving import (
    ELEMENT_BYTES,
    MEMORY_SHARE,
    ModelSize,
    Traffic,
    batch_that_fits,
    devices_of_instance,
    half_precision,
    step_seconds_by_part,
)
from lascaux.planner.uncertainty import Draws, Interval, Samples, interval_of
from lascaux.units import DAY, HOUR, format_bytes

DAYS_PER_YEAR = 365


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """A model in use: speed, hours, dollars, energy."""

    model: str
    device: str
    traffic: str
    assumptions: tuple[str, ...]
    devices_per_instance: int
    batch_requests: int
    weight_bytes: float
    memory_bytes: float
    """of an instance, for weights and cache"""
    time_shares: dict[str, float]
    """of a step, at the median: weights, cache, products"""
    output_tokens_per_day: Interval
    tokens_per_second_per_instance: Interval
    """output tokens, fully loaded"""
    devices: Interval
    device_hours_per_day: Interval
    usd_per_day: Interval
    usd_per_year: Interval
    usd_per_million_tokens: Interval
    """output tokens; their prompts are in it"""
    kwh_per_day: Interval | None
    price_source: str
    samples: dict[str, Samples] = field(repr=False, compare=False)
    """usd, hours and flops of a day, over the draws"""


@dataclass(frozen=True, kw_only=True, slots=True)
class BreakEven:
    """When using a model has cost more than making it."""

    days: Interval
    within_a_year: float
    """probability"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Experiments, training and inference after a year, per cent."""

    by_compute: dict[str, Interval]
    """FLOPs"""
    by_energy: dict[str, Interval]
    """device-hours on the same device"""


# --- Serving


def plan_deployment(
    model: ModelSize,
    device: Device,
    traffic: Traffic,
    draws: Draws,
    *,
    plan: PlanConfig | None = None,
    batch_requests: int | None = None,
    devices_per_instance: int | None = None,
    busy_share: float | None = None,
) -> Deployment:
    """Speed, hours, dollars and energy of serving a model to this traffic.

    `plan` has the price or its year, as for training. `batch_requests` unset: as many as memory
    holds, 256 at most. `devices_per_instance` unset: the fewest, by doubling, that hold the weights
    and 16 requests. `busy_share`: mean over greatest load, unset: drawn.
    Raises: ConfigError for a device without memory for the model, without a price, or without a
        half-precision rate, and for numbers out of range.
    """
    plan = plan or PlanConfig()
    context = float(np.percentile(traffic.prompt_tokens + traffic.output_tokens, 95))
    size = devices_of_instance(model, device, context, devices_per_instance, batch_requests)
    if busy_share is not None and not 0 < busy_share <= 1:
        raise ConfigError(f"busy_share must be above 0 and at most 1; got {busy_share:g}")
    batch = batch_requests or batch_that_fits(model, device, size, context)
    parts = step_seconds_by_part(model, device, size, batch, traffic)
    step = sum(parts.values(), np.zeros(draws.num_draws))
    per_second = batch * fact_draws(draws, "serving-utilization") / step
    tokens = traffic.requests_per_day * traffic.output_tokens
    busy = fact_draws(draws, "busy-share") if busy_share is None else busy_share
    instances = np.maximum(1.0, tokens / DAY / per_second / busy)
    hours = instances * size * 24
    count = math.ceil(float(np.median(instances)) * size)
    bought = bill(plan, device, count, hours, np.zeros(draws.num_draws), draws)
    usd = bought.cost_usd["on_demand"]
    if usd is None:
        raise ConfigError(bought.missing["on_demand"])
    return Deployment(
        model=model.name,
        device=device.id,
        traffic=traffic.name,
        assumptions=_assumptions(traffic, busy_share, model),
        devices_per_instance=size,
        batch_requests=batch,
        weight_bytes=model.total * ELEMENT_BYTES,
        memory_bytes=size * device.memory_bytes * MEMORY_SHARE,
        time_shares={name: float(np.median(part / step)) for name, part in parts.items()},
        output_tokens_per_day=interval_of(tokens),
        tokens_per_second_per_instance=interval_of(per_second),
        devices=interval_of(instances * size),
        device_hours_per_day=interval_of(hours),
        usd_per_day=interval_of(usd),
        usd_per_year=interval_of(usd).scaled(DAYS_PER_YEAR),
        usd_per_million_tokens=interval_of(usd / tokens * 1e6),
        kwh_per_day=None if bought.energy_kwh is None else interval_of(bought.energy_kwh),
        price_source=bought.sources.get("price", ""),
        samples={"usd": usd, "hours": hours, "flops": _flops_per_day(model, traffic)},
    )


def _flops_per_day(model: ModelSize, traffic: Traffic) -> Samples:
    tokens = traffic.prompt_tokens + traffic.output_tokens
    each = 2 * model.active + model.attention_flops * tokens / 2
    return traffic.requests_per_day * tokens * each


def _assumptions(traffic: Traffic, busy_share: float | None, model: ModelSize) -> tuple[str, ...]:
    """What is drawn or left out."""
    facts = ["serving-utilization", *(["busy-share"] if busy_share is None else [])]
    texts = list(traffic.assumptions)
    for fact in map(find_fact, facts):
        interval = f"{fact['value']:g} ({fact['low']:g} to {fact['high']:g}, 90 %)"
        texts.append(f"{fact['id']} {interval} {fact['unit']} [assumed; {fact['source']}]")
    if model.cache_bytes == 0:
        texts.append("cache and attention are left out: only parameters are known")
    return tuple(texts)


# --- Against development


def break_even_day(
    deployment: Deployment, development_usd: Samples | Interval, draws: Draws
) -> BreakEven:
    """The day on which the sum of serving costs passes what development cost.

    Raises: ConfigError for a development cost that is not above 0.
    """
    if isinstance(development_usd, Interval):
        if development_usd.p5 <= 0:
            raise ConfigError(f"development must cost above 0 USD; got {development_usd.p5:g}")
        development_usd = draws_of_interval(draws, "development cost", development_usd)
    days = development_usd / deployment.samples["usd"]
    return BreakEven(days=interval_of(days), within_a_year=float(np.mean(days <= DAYS_PER_YEAR)))


def split_after_a_year(
    deployment: Deployment, device: Device, training_flops: float, draws: Draws
) -> Split:
    """Experiments, training and inference after a year of use.

    `training_flops`: model FLOPs of the final run, which trains on the same device at a utilization
    drawn from published runs; experiments as published projects had them.
    Raises: ConfigError for FLOPs that are not above 0.
    """
    if not 0 < training_flops < math.inf:
        raise ConfigError(f"training_flops must be above 0; got {training_flops:g}")
    beside = experiment_factor(PlanConfig(), draws) - 1
    peak = device.peak(half_precision(device))
    hours = training_flops / (training_utilization(draws) * peak) / HOUR
    yearly = {name: DAYS_PER_YEAR * drawn for name, drawn in deployment.samples.items()}
    flops = np.full(draws.num_draws, training_flops)
    return Split(
        by_compute=_shares(flops * beside, flops, yearly["flops"]),
        by_energy=_shares(hours * beside, hours, yearly["hours"]),
    )


def _shares(experiments: Samples, training: Samples, inference: Samples) -> dict[str, Interval]:
    parts = {"experiments": experiments, "training": training, "inference": inference}
    total = experiments + training + inference
    return {name: interval_of(100 * part / total) for name, part in parts.items()}


def deployment_share_of_development() -> dict[str, Any]:
    """The published ratio of the cost of deployment to that of development, and its correction."""
    row, later = find_fact("deployment-over-development"), read_facts("diffusion")
    ratio = {key: row[key] for key in ("value", "low", "high", "level", "unit", "source")}
    return ratio | {"corrected": later["deployment_correction"]}


# --- Text


def describe_deployment(
    deployment: Deployment, even: BreakEven | None = None, split: Split | None = None
) -> str:
    """Speed, cost and what they rest on; with what it is compared to."""
    it = deployment
    step = ", ".join(f"{name} {100 * share:.0f} %" for name, share in it.time_shares.items())
    kwh = "not known" if it.kwh_per_day is None else count_text(it.kwh_per_day, "kWh")
    api = find_fact("gpt3-api-usd-per-million-tokens")
    own, words = (find_fact(f"bloom-self-hosted-{what}-per-day") for what in ("usd", "words"))
    own_usd = own["value"] / (words["value"] * find_fact("tokens-per-word")["value"]) * 1e6
    rows = {
        "traffic": count_text(it.output_tokens_per_day, "output tokens a day"),
        "instance": f"{it.devices_per_instance} x {it.device}, {it.batch_requests} requests at a "
        f"time; weights {format_bytes(it.weight_bytes)} of {format_bytes(it.memory_bytes)}",
        "speed": count_text(it.tokens_per_second_per_instance, "output tokens/s an instance"),
        "a step": step,
        "devices": count_text(it.devices),
        "device-hours a day": count_text(it.device_hours_per_day),
        "cost a day": usd_text(it.usd_per_day),
        "cost a year": usd_text(it.usd_per_year),
        "per million tokens": f"{usd_text(it.usd_per_million_tokens)} of output, prompts included",
        "GPT-3's list price": f"{api['value']} $ a million in {api['year']} [{api['source']}]",
        "BLOOM self-hosted": f"{own_usd:.2f} $ a million: {own['value']} {own['unit']} "
        f"[{own['source']}]",
        "energy a day": f"{kwh}, server and building included",
    }
    if even is not None:
        chance = f"{100 * even.within_a_year:.0f} % within a year"
        rows["passes development"] = f"after {count_text(even.days, 'days')}; {chance}"
    lines = [f"{it.model} for {it.traffic}: median (90 % interval)", ""]
    lines += [f"  {label:<21}{text}" for label, text in rows.items()]
    lines += _split_lines(split) if split is not None else []
    lines += ["", f"  price: {it.price_source}", *(f"  {text}" for text in it.assumptions)]
    return "\n".join([*lines, "", describe_published_share()])


def _split_lines(split: Split) -> list[str]:
    """Ours and the published splits after one another."""
    named = {"by FLOPs": split.by_compute, "by energy": split.by_energy}
    lines = ["", "  after a year, per cent"]
    for label, shares in named.items():
        text = ", ".join(
            f"{name} {each.p50:.2g} ({each.p5:.2g} to {each.p95:.2g})"
            for name, each in shares.items()
        )
        lines.append(f"    {label}: {text}")
    for row in read_facts("diffusion")["split"]:
        text = ", ".join(f"{name} {share}" for name, share in row["shares"].items())
        lines.append(f"    {row['what']}: {text} [{row['source']}]")
    return lines


def describe_published_share() -> str:
    """The published ratio, never without its correction."""
    row = deployment_share_of_development()
    later = row["corrected"]
    interval = f"{100 * row['low']:.0f} to {100 * row['high']:.0f} %, 90 %"
    return (
        f"  published: {100 * row['value']:.0f} % ({interval}) {row['unit']} [{row['source']}]\n"
        f"  corrected by its author, {later['when']}: {later['text']} [{later['source']}]"
    )


def deployment_figures(
    deployment: Deployment, even: BreakEven | None = None, split: Split | None = None
) -> dict[str, Any]:
    """For JSON; tokens, hours, dollars, kWh."""
    figures: dict[str, Any] = {}
    for each in fields(deployment):
        value = getattr(deployment, each.name)
        if each.name != "samples":
            figures[each.name] = value.as_dict() if isinstance(value, Interval) else value
    if even is not None:
        figures["break_even_days"] = even.days.as_dict()
        figures["break_even_within_a_year"] = even.within_a_year
    if split is not None:
        figures["split_by_compute"] = {k: v.as_dict() for k, v in split.by_compute.items()}
        figures["split_by_energy"] = {k: v.as_dict() for k, v in split.by_energy.items()}
    return figures | {"published_share": deployment_share_of_development()}
