"""Energy, CO2 and dollars of device-hours, in four ledgers that answer different questions.

on_demand: rented by the hour; committed: the same with a commitment of three years; amortised:
one's own hardware, its loss of value and the energy; purchase: buying the whole cluster. After
Epoch AI, The rising costs of training frontier AI models, 2024, from which the intervals come;
there every input is drawn on its own, here the factors are shared.
"""

import math
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np

from lascaux.config.plan_schema import PlanConfig
from lascaux.errors import ConfigError
from lascaux.planner.devices import Device
from lascaux.planner.facts import read_facts
from lascaux.planner.uncertainty import Draws, Samples

LEDGERS = ("on_demand", "committed", "amortised", "purchase")
STATED_PRICE_LN_SD = 0.05
MISSING_SPREAD_LN_SD = 0.4
"""of the logarithm of prices where a row has no spread: the middle of the rows that have one"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bill:
    """Arrays over the draws; None where no price is known, with the reason in `missing`."""

    energy_kwh: Samples | None
    co2_kg: Samples | None
    cost_usd: dict[str, Samples | None]
    missing: dict[str, str]
    sources: dict[str, str]


def bill(
    plan: PlanConfig,
    device: Device,
    devices: int,
    device_hours: Samples,
    slowness: Samples,
    draws: Draws,
) -> Bill:
    """What so many device-hours take.

    `slowness` is ln(step seconds / median): a device that waits draws less power.
    """
    missing: dict[str, str] = {}
    sources: dict[str, str] = {}
    energy = _energy(device, device_hours, slowness, draws, plan, missing, sources)
    co2 = None if energy is None else energy * _grid(plan, draws, sources)
    price = _rental_price(plan, device, draws, missing, sources)
    value = _hardware_value(plan, device, draws, missing, sources)
    costs: dict[str, Samples | None] = dict.fromkeys(LEDGERS)
    if price is not None:
        costs["on_demand"] = device_hours * price
        discount = draws.lognormal90("commitment", *_share_left_after_commitment())
        costs["committed"] = device_hours * price * discount
        sources["committed"] = "three years: 0.49 to 0.64 less, Epoch AI, 2024"
    if value is not None:
        per_hour, purchase = value
        electricity = _electricity_usd(draws, sources)
        costs["amortised"] = device_hours * per_hour
        if energy is not None:
            costs["amortised"] = costs["amortised"] + energy * electricity
        costs["purchase"] = devices * purchase
    return Bill(energy_kwh=energy, co2_kg=co2, cost_usd=costs, missing=missing, sources=sources)


def _share_left_after_commitment() -> tuple[float, float]:
    """Of the price by the hour, with three years' commitment: least and most over the providers."""
    discounts = [
        each["three_years"] for each in read_facts("costs")["commitment_discount"].values()
    ]
    return 1 - max(discounts), 1 - min(discounts)


def _energy(
    device: Device,
    device_hours: Samples,
    slowness: Samples,
    draws: Draws,
    plan: PlanConfig,
    missing: dict[str, str],
    sources: dict[str, str],
) -> Samples | None:
    """Device-hours x watts of a device with its share of the server x PUE, kWh."""
    costs = read_facts("costs")
    if plan.power_watts is not None:
        watts = draws.lognormal90("power", plan.power_watts / 1.1, plan.power_watts * 1.1)
        sources["power"] = "plan.power_watts"
    elif device.power_watts is None:
        missing["energy_kwh"] = f"no power is known for {device.id}; give --plan.power_watts"
        return None
    elif reported := _row_of("average_watts", device):
        watts = draws.lognormal("power", reported["watts"], 0.12)
        sources["power"] = reported["source"]
    else:
        tpu = device.vendor == "Google"
        interval = costs["interval90"][f"average_power_over_tdp_{'tpu' if tpu else 'gpu'}"]
        shared = costs["server_power_multiplier"]
        multiplier = shared.get(device.id, shared.get(device.generation, shared["default"]))
        fraction = draws.lognormal90("power", interval["low"], interval["high"])
        watts = device.power_watts * multiplier * fraction
        sources["power"] = f"{device.power_watts:g} W rated, server x{multiplier:g}, Epoch AI, 2024"
    pue = costs["interval90"]
    if plan.pue is not None:
        ratio: Samples | float = plan.pue
    else:
        ratio = draws.lognormal90("pue", pue["pue_hyperscaler"]["low"], pue["pue_other"]["high"])
    return device_hours * watts * np.exp(-0.3 * slowness) * ratio / 1000


def _grid(plan: PlanConfig, draws: Draws, sources: dict[str, str]) -> Samples | float:
    if plan.grid_kg_per_kwh is not None:
        return plan.grid_kg_per_kwh
    logs = [math.log(row["kg_per_kwh"]) for row in read_facts("costs")["grid"]]
    sources["grid"] = "spread over the grids of six published runs"
    mean = sum(logs) / len(logs)
    variance = sum((each - mean) ** 2 for each in logs) / (len(logs) - 1)
    return draws.lognormal("grid", math.exp(mean), math.sqrt(variance))


def _electricity_usd(draws: Draws, sources: dict[str, str]) -> Samples:
    row = read_facts("costs")["electricity_usd_per_kwh"]
    interval = read_facts("costs")["interval90"]["electricity_price"]
    sources["electricity"] = row["source"]
    return row["value"] * draws.lognormal90("electricity", interval["low"], interval["high"])


def _row_of(table: str, device: Device) -> dict[str, Any] | None:
    """The row of a table of costs that speaks of a device."""
    return next((row for row in read_facts("costs")[table] if device.id in row["covers"]), None)


def price_row(device: Device, year: int | None) -> dict[str, Any] | None:
    """The rental price of a device in a year, the newest for None; None where none is known.

    Raises: ConfigError for a year before the first price.
    """
    rows = [row for row in read_facts("prices")["price"] if device.id in row["covers"]]
    if not rows:
        return None
    rows.sort(key=lambda row: (row["year"], row.get("n", 1)))
    newest_year = rows[-1].get("year_last", rows[-1]["year"])
    if year is not None and year > newest_year + 1:
        raise ConfigError(
            f"'plan.year' {year}: the newest price of {device.id} is of {newest_year}; leave it "
            "out, or give --plan.price_usd_per_device_hour and --plan.price_date"
        )
    if year is None:
        return rows[-1]
    earlier = [row for row in rows if row["year"] <= year]
    if not earlier:
        raise ConfigError(
            f"'plan.year' {year}: no price of {device.id} is known before {rows[0]['year']}; give "
            "--plan.price_usd_per_device_hour and --plan.price_date"
        )
    newest = [row for row in earlier if row["year"] == earlier[-1]["year"]]
    return max(newest, key=lambda row: row.get("n", 1))


def _rental_price(
    plan: PlanConfig,
    device: Device,
    draws: Draws,
    missing: dict[str, str],
    sources: dict[str, str],
) -> Samples | None:
    """Dollars for a device and hour."""
    if plan.price_usd_per_device_hour is not None:
        sources["price"] = f"{plan.price_usd_per_device_hour:g} $, stated, {plan.price_date}"
        return draws.lognormal("price", plan.price_usd_per_device_hour, STATED_PRICE_LN_SD)
    row = price_row(device, plan.year)
    if row is None:
        why = (
            f"no rental price of {device.id} is known; give --plan.price_usd_per_device_hour and "
            "--plan.price_date"
        )
        missing["on_demand"] = missing["committed"] = why
        return None
    last = row.get("year_last", row["year"])
    span = str(row["year"]) if last == row["year"] else f"{row['year']} to {last}"
    stale = ", stale" if plan.year is None and last < date.today().year else ""
    sources["price"] = f"{row['on_demand_median']:g} $ an hour, {span}{stale}: {row['source']}"
    return draws.lognormal("price", row["on_demand_median"], row.get("ln_sd", MISSING_SPREAD_LN_SD))


def _hardware_value(
    plan: PlanConfig,
    device: Device,
    draws: Draws,
    missing: dict[str, str],
    sources: dict[str, str],
) -> tuple[Samples, Samples] | None:
    """Loss of value an hour, and the price to buy: server and interconnect, for each device."""
    costs = read_facts("costs")
    row = _row_of("server_price", device)
    if row is None:
        why = f"no purchase price of {device.id} is known"
        missing["amortised"] = missing["purchase"] = why
        return None
    sources["server"] = row["source"]
    kind = "tpu_price" if device.vendor == "Google" else "gpu_price"
    spread = costs["interval90"][kind]
    decline = costs["interval90"]["price_performance_oom_per_year"]
    rate = draws.lognormal90("decline", decline["low"], decline["high"])
    used_in = plan.year or _price_year(device) or row["year"] + 1
    age = max(0.0, used_in - row["year"])
    new = row["usd_per_device"] / (1 - costs["interconnect_share_of_cluster"])
    new = new * draws.lognormal90("server price", spread["low"], spread["high"])
    now = new * 10 ** (-rate * age)
    per_hour = now * rate * math.log(10) / costs["hours_per_year"]
    return per_hour, now


def _price_year(device: Device) -> int | None:
    row = price_row(device, None)
    return None if row is None else row.get("year_last", row["year"])


def experiment_factor(plan: PlanConfig, draws: Draws) -> Samples:
    """All compute of a project over its final run, at least 1."""
    if plan.experiment_factor is not None:
        return np.full(draws.num_draws, plan.experiment_factor)
    logs = [math.log(row["factor"]) for row in read_facts("costs")["experiment_factor"]]
    mean = sum(logs) / len(logs)
    spread = math.sqrt(sum((each - mean) ** 2 for each in logs) / (len(logs) - 1))
    return np.maximum(1.0, draws.lognormal("experiments", math.exp(mean), spread))
