"""What it took to make a known model, and what it would take today.

FLOPs are recomputed from the preset where there is one (6 N_active + 12 L d T a token, with the
head, attention in full, no recomputation) and stand beside what the source prints. "Then" is the
hardware of the time by its published hours; "now" is H100s by a utilization drawn from published
runs. Costs are the ledgers of `money.py`, and a commitment of one year; staff is left out. Facts:
`facts/diffusion.toml` for the systems, `facts/runs.toml` for their runs.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from lascaux.config.load import build_config, read_target
from lascaux.config.plan_schema import PlanConfig
from lascaux.errors import ConfigError, suggest
from lascaux.model.accounting import flops_per_token
from lascaux.planner.capability import (
    count_text,
    fact_draws,
    fact_interval,
    find_fact,
    format_usd,
    two_piece,
    usd_text,
)
from lascaux.planner.devices import find_device
from lascaux.planner.facts import read_facts
from lascaux.planner.money import bill, experiment_factor
from lascaux.planner.runs import find_run
from lascaux.planner.uncertainty import Draws, Interval, Samples, interval_of
from lascaux.units import HOUR, format_percent

DEVICE_NOW = "H100-80GB-SXM"
LEDGERS = {
    "on_demand": "on demand",
    "one_year": "one-year commitment",
    "committed": "three-year commitment",
    "amortised": "own hardware, energy",
    "purchase": "purchase",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunCost:
    """A run on devices: hours, and dollars by ledger; a ledger without a known price is absent."""

    device: str
    devices: int
    device_hours: Interval
    days: Interval
    price_source: str
    usd: dict[str, Interval]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicationCard:
    """A known system: its work, its bill then and now, its people."""

    system: str
    preset: str | None
    tokens: int | None
    flops_recomputed: float | None
    """model FLOPs of the preset over the tokens"""
    flops_printed: float | None
    flops_for_now: float
    source: str
    then: RunCost
    now: RunCost
    utilization_then: float | None
    """model FLOPs over the published device-hours and the peak"""
    ideal_days_then: float | None
    """at the printed rate with nothing lost, where a rate is printed"""
    expected_days_then: Interval | None
    """the same with time lost as in published runs"""
    project_usd: Interval
    """compute of the whole project: the final run, by the price that fits, times its factor"""
    price_that_fits: str
    published: dict[str, Interval]
    """dollars as published: of the final run, of the project"""
    other_costs: tuple[str, ...]
    people: int | None
    people_days: int | None
    people_source: str
    months_after_gpt3: int | None
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class OneRuler:
    """OPT-175B's utilization over GPT-3's, as printed and with both counting model FLOPs."""

    as_printed: float
    low: float
    high: float


def systems() -> tuple[str, ...]:
    """The systems there is a card for."""
    return tuple(row["id"] for row in read_facts("diffusion")["system"])


def replicate(system: str, draws: Draws, *, devices_now: int | None = None) -> ReplicationCard:
    """The card of a system; `devices_now` unset: as many devices now as then.

    Raises: ConfigError for an unknown system or fewer than one device.
    """
    row = _find_system(system)
    run = find_run(row["run"]).row
    published = run.get("published", {})
    devices = run["devices"]
    if devices_now is not None and devices_now < 1:
        raise ConfigError(f"devices must be 1 or more; got {devices_now} (devices_now)")
    recomputed = recomputed_flops(system)
    printed = published.get("total_flop")
    flops = printed if row.get("flops_for_now") == "printed" else recomputed or printed
    hours = _published_hours(row, run)
    ledgers = _ledgers(
        run["device"], devices, _hours_then(row, run, draws), row["price_year"], draws
    )
    final_run = ledgers[row["price_that_fits"]]
    ideal_days = _ideal_days(row)
    costs = read_facts("diffusion")["published_cost"]
    peak = max(find_device(run["device"]).peak_flops_per_second.values())
    return ReplicationCard(
        system=system,
        preset=row.get("preset"),
        tokens=row.get("tokens"),
        flops_recomputed=recomputed,
        flops_printed=printed,
        flops_for_now=flops,
        source=run["source"],
        then=_run_cost(
            run["device"], devices, _hours_then(row, run, draws), row["price_year"], draws
        ),
        now=_run_cost(DEVICE_NOW, devices_now or devices, _hours_now(flops, draws), None, draws),
        utilization_then=recomputed / (hours * HOUR * peak) if recomputed else None,
        ideal_days_then=ideal_days,
        expected_days_then=interval_of(ideal_days / _goodput(draws)) if ideal_days else None,
        project_usd=interval_of(final_run * project_factor(draws, row.get("experiment_cases"))),
        price_that_fits=row["price_that_fits"],
        published={key: fact_interval(row[key]) for key in ("final_run", "project") if key in row},
        other_costs=tuple(_cost_text(cost) for cost in costs if cost["system"] == system),
        people=row.get("people"),
        people_days=row.get("people_days"),
        people_source=row.get("people_source", ""),
        months_after_gpt3=row.get("months_after_gpt3"),
        note=row.get("note", ""),
    )


def _find_system(system: str) -> dict[str, Any]:
    rows = {row["id"]: row for row in read_facts("diffusion")["system"]}
    if system not in rows:
        known = ", ".join(rows)
        raise ConfigError(f"no card for '{system}'{suggest(system, rows)}; known: {known}")
    return rows[system]


# --- Work and hours


@cache
def recomputed_flops(system: str) -> float | None:
    """Model FLOPs of a system's preset over its tokens; None without a preset."""
    row = _find_system(system)
    if "preset" not in row:
        return None
    config = build_config(read_target(row["preset"]))
    return float(flops_per_token(config.model, config.train.seq_len)) * row["tokens"]


def _published_hours(row: dict[str, Any], run: dict[str, Any]) -> float:
    """Device-hours as printed, or devices by days."""
    published = run["published"]
    hours = row.get("device_hours") or published.get("device_hours")
    return float(hours or run["devices"] * published["wall_days"] * 24)


def _ideal_days(row: dict[str, Any]) -> float | None:
    """Days at the printed rate, by the FLOPs that the rate counts: 6N."""
    if "rate_run" not in row:
        return None
    rate = find_run(row["rate_run"]).row
    assert rate["published"]["counts"] == "6N"
    flops = 6 * rate["parameters"] * row["tokens"]
    return flops / (rate["devices"] * rate["published"]["tflops_per_device"] * 1e12) / (24 * HOUR)


def _hours_then(row: dict[str, Any], run: dict[str, Any], draws: Draws) -> Samples:
    """The published hours, as doubtful as Epoch AI holds such figures to be."""
    hours = np.full(draws.num_draws, _published_hours(row, run))
    return hours * fact_draws(draws, row["hours_in_doubt"]) if "hours_in_doubt" in row else hours


def _hours_now(flops: float, draws: Draws) -> Samples:
    peak = find_device(DEVICE_NOW).peak("bf16")
    return flops / (training_utilization(draws) * peak) / HOUR


def _goodput(draws: Draws) -> Samples:
    """Ideal time over the time it took, of the runs of `facts/costs.toml`."""
    seen = [row["ideal_over_actual"] for row in read_facts("costs")["goodput"]]
    return two_piece(draws, "goodput", min(seen), float(np.median(seen)), max(seen))


def project_factor(draws: Draws, cases: str | None) -> Samples:
    """All compute of a project over its final run.

    `cases`: how the rows of `facts/costs.toml` begin that speak of it. Their largest, the experts'
    figure, is the median; the low end is their least, or that of all rows where there is one alone;
    the high end is the largest of all rows. None: as for any project.
    """
    if cases is None:
        return experiment_factor(PlanConfig(), draws)
    rows = read_facts("costs")["experiment_factor"]
    factors = [row["factor"] for row in rows]
    known = [row["factor"] for row in rows if row["case"].startswith(cases)]
    low = min(known) if len(known) > 1 else min(factors)
    return two_piece(draws, "experiments", low, max(known), max(factors))


def training_utilization(draws: Draws) -> Samples:
    """Model FLOPs over all device-hours of a run and the dense peak, of published runs."""
    return fact_draws(draws, "training-utilization-whole-run")


def utilization_on_one_ruler() -> OneRuler:
    """OPT-175B over GPT-3: by model FLOPs and hours, and by the figure PaLM prints for GPT-3."""
    printed = [find_fact(f"{name}-utilization-as-printed")["value"] for name in ("gpt3", "opt175b")]
    palm = find_run("gpt-3-175b-mfu-as-printed-by-palm").row["published"]["mfu"]
    gpt3, opt = (replicate(name, Draws(0)).utilization_then for name in ("gpt-3", "opt-175b"))
    assert gpt3 is not None and opt is not None
    return OneRuler(as_printed=printed[1] / printed[0], low=opt / palm, high=opt / gpt3)


# --- Dollars


def _ledgers(
    device: str, devices: int, hours: Samples, year: int | None, draws: Draws
) -> dict[str, Samples]:
    """Dollars by ledger."""
    part = find_device(device)
    found = bill(PlanConfig(year=year), part, devices, hours, np.zeros(draws.num_draws), draws)
    ledgers = {name: usd for name, usd in found.cost_usd.items() if usd is not None}
    if "on_demand" in ledgers:
        ledgers["one_year"] = ledgers["on_demand"] * _one_year_share(draws)
    return {name: ledgers[name] for name in LEDGERS if name in ledgers}


def _one_year_share(draws: Draws) -> Samples:
    """Share of the price on demand that a commitment of one year costs, over the providers."""
    providers = read_facts("costs")["commitment_discount"].values()
    shares = [1 - provider["one_year"] for provider in providers]
    return draws.lognormal90("commitment", min(shares), max(shares))


def _run_cost(device: str, devices: int, hours: Samples, year: int | None, draws: Draws) -> RunCost:
    part, level = find_device(device), np.zeros(draws.num_draws)
    sources = bill(PlanConfig(year=year), part, devices, hours, level, draws).sources
    ledgers = _ledgers(device, devices, hours, year, draws)
    return RunCost(
        device=device,
        devices=devices,
        device_hours=interval_of(hours),
        days=interval_of(hours / devices / 24),
        price_source=sources.get("price", "no rental price known"),
        usd={name: interval_of(usd) for name, usd in ledgers.items()},
    )


def _cost_text(cost: dict[str, Any]) -> str:
    low, high = (format_usd(usd) for usd in cost["usd"])
    return f"{low if low == high else f'{low} to {high}'} {cost['meaning']} [{cost['source']}]"


# --- Text


def describe_replication(card: ReplicationCard) -> str:
    """The card as text: work, the run then and now, project, people."""
    lines = [f"{card.system}: final run, median (90 % interval)", ""]
    lines += [f"  work              {_work_text(card)}", *_table_lines(card)]
    if card.utilization_then is not None:
        share = format_percent(card.utilization_then)
        lines.append(f"  utilization then  {share} of the peak, model FLOPs over all device-hours")
    now = find_fact("training-utilization-whole-run")
    lines.append(
        f"  utilization now   {100 * now['value']:.0f} % ({100 * now['low']:.1f} to "
        f"{100 * now['high']:.0f} %) {now['unit']} [{now['source']}]"
    )
    if card.ideal_days_then is not None and card.expected_days_then is not None:
        days = count_text(card.expected_days_then, "days")
        lines.append(
            f"  days then         {card.ideal_days_then:.1f} at the printed rate with nothing "
            f"lost, {days} with what runs lose"
        )
    lines.append(
        f"  project then      {usd_text(card.project_usd)}: {LEDGERS[card.price_that_fits]}, with "
        "experiments and failures, without staff"
    )
    for what, usd in card.published.items():
        name = what.replace("_", " ")
        lines.append(f"  published         {usd_text(usd)} {name} [Cottier 2022, summary, table 1]")
    lines += [f"  published         {text}" for text in card.other_costs]
    lines.append(f"  people            {_people_text(card)}")
    lines += [f"  note              {card.note}"] if card.note else []
    lines.append(f"  price then        {card.then.price_source}")
    lines.append(f"  price now         {card.now.price_source}")
    return "\n".join([*lines, f"  run               {card.source}"])


def _table_lines(card: ReplicationCard) -> list[str]:
    """Then beside now, a row for each quantity."""
    pair = (card.then, card.now)
    rows = [("", [f"then: {run.devices:,} {run.device}" for run in pair])]
    rows[0][1][1] = f"now: {card.now.devices:,} {card.now.device}"
    rows.append(("device-hours", [count_text(run.device_hours) for run in pair]))
    rows.append(("days", [count_text(run.days) for run in pair]))
    for name, label in LEDGERS.items():
        texts = [usd_text(run.usd[name]) if name in run.usd else "not known" for run in pair]
        rows.append((label, texts))
    return [f"  {label:<24}{texts[0]:<36}{texts[1]}" for label, texts in rows]


def _work_text(card: ReplicationCard) -> str:
    recomputed = "no preset"
    if card.flops_recomputed is not None and card.tokens is not None:
        recomputed = (
            f"{card.flops_recomputed:.3g} FLOPs recomputed from {card.preset} and "
            f"{card.tokens / 1e9:,.0f}e9 tokens (model FLOPs)"
        )
    printed = f"{card.flops_printed:.3g} printed" if card.flops_printed else "none printed"
    return f"{recomputed}; {printed}"


def _people_text(card: ReplicationCard) -> str:
    parts = ["not known"]
    if card.people is not None:
        parts = [f"{card.people} in the core team, {card.people_days} days [{card.people_source}]"]
    if card.months_after_gpt3 is not None:
        parts.append(f"{card.months_after_gpt3} months after GPT-3")
    return "; ".join(parts)


def describe_one_ruler(ruler: OneRuler) -> str:
    """Why the printed utilizations cannot be compared, in one line."""
    return (
        f"utilization of OPT-175B over GPT-3: {ruler.low:.2f} to {ruler.high:.2f} with model FLOPs "
        f"on both sides; {ruler.as_printed:.1f} as printed, where OPT-175B counts recomputation"
    )


def replication_figures(card: ReplicationCard) -> dict[str, Any]:
    """For JSON; FLOPs, hours, days, dollars."""
    plain = (
        "system preset tokens flops_recomputed flops_printed flops_for_now source utilization_then "
        "ideal_days_then price_that_fits people people_days months_after_gpt3 note"
    )
    days = card.expected_days_then
    return {key: getattr(card, key) for key in plain.split()} | {
        "then": _run_figures(card.then),
        "now": _run_figures(card.now),
        "expected_days_then": days.as_dict() if days else None,
        "project_usd": card.project_usd.as_dict(),
        "published_usd": {key: usd.as_dict() for key, usd in card.published.items()},
        "other_costs": list(card.other_costs),
    }


def _run_figures(run: RunCost) -> dict[str, Any]:
    return {
        "device": run.device,
        "devices": run.devices,
        "device_hours": run.device_hours.as_dict(),
        "days": run.days.as_dict(),
        "price_source": run.price_source,
        "usd": {name: usd.as_dict() for name, usd in run.usd.items()},
    }
