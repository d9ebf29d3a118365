"""What a given capability costs over the years, and how published forecasts of cost did.

Two trends make a capability cheaper: FLOP/s per dollar double, the compute for a given loss halves.
Both are drawn from their published intervals, whose level and version are always printed. The
trends rest on the years 2012 to 2023; further from these years than they span nothing is stated.
Facts: `facts/diffusion.toml`.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from lascaux.errors import ConfigError, suggest
from lascaux.planner.facts import read_facts
from lascaux.planner.uncertainty import Draws, Interval, Samples, interval_of
from lascaux.units import format_count

PRICE_PERFORMANCE = "gpu-ml"
ALGORITHMS = "paper"
"""the wider of the two published intervals"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trend:
    """A rate of progress with its interval, as published."""

    id: str
    kind: str
    value: float
    low: float
    high: float
    level: float
    unit: str
    source: str

    @property
    def text(self) -> str:
        """Figure, interval, level, unit and version in one line."""
        interval = f"{self.low:g} to {self.high:g} at {100 * self.level:.0f} %"
        return f"{self.value:g} ({interval}) {self.unit}; '{self.id}': {self.source}"


@dataclass(frozen=True, kw_only=True, slots=True)
class CapabilityCost:
    """What the capability costs in each year, dollars of the start."""

    start_year: float
    start_usd: Interval
    price_performance: Trend
    algorithms: Trend
    usd_by_year: dict[float, Interval]
    first_data_year: int
    last_data_year: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredForecast:
    """A forecast beside what came."""

    id: str
    what: str
    forecast: str
    source: str
    outcome: str
    outcome_source: str
    verdict: str
    """hit, miss or open"""


def capability_cost(
    start_usd: Interval,
    start_year: float,
    years_ahead: int,
    draws: Draws,
    *,
    price_performance: str = PRICE_PERFORMANCE,
    algorithms: str = ALGORITHMS,
) -> CapabilityCost:
    """What a capability that cost `start_usd` in `start_year` costs in each later year.

    Raises: ConfigError for an unknown trend, a cost that is not above 0, or a year further from
        the data of the trends than the data spans.
    """
    hardware = find_trend(price_performance, "price-performance")
    software = find_trend(algorithms, "algorithms")
    span = read_facts("diffusion")["trend_data"]
    first, last = span["first_year"], span["last_year"]
    _check_years(start_year, years_ahead, first, last)
    if start_usd.p5 <= 0:
        raise ConfigError(f"a starting cost must be above 0 USD; got {start_usd.p5:g} (start_usd)")
    start = draws_of_interval(draws, "starting cost", start_usd)
    halvings = 1 / trend_draws(draws, hardware) + 12 / trend_draws(draws, software)
    years = [start_year + ahead for ahead in range(years_ahead + 1)]
    return CapabilityCost(
        start_year=start_year,
        start_usd=interval_of(start),
        price_performance=hardware,
        algorithms=software,
        usd_by_year={
            year: interval_of(start * np.exp2(-(year - start_year) * halvings)) for year in years
        },
        first_data_year=first,
        last_data_year=last,
    )


def _check_years(start_year: float, years_ahead: int, first: int, last: int) -> None:
    """Refuse what the data cannot say."""
    if years_ahead < 0:
        raise ConfigError(f"years ahead must be 0 or more; got {years_ahead} (years_ahead)")
    earliest, latest = first - (last - first), last + (last - first)
    outside = [year for year in (start_year, start_year + years_ahead) if year > latest]
    outside += [start_year] if start_year < earliest else []
    if outside:
        raise ConfigError(
            f"no figure for {outside[0]:g}: the trends rest on {first} to {last}, {last - first} "
            f"years, and are carried no further than as many; ask within {earliest} to {latest}"
        )


def find_trend(name: str, kind: str) -> Trend:
    """A trend of this kind.

    Raises: ConfigError with the known ones.
    """
    rows = {row["id"]: row for row in read_facts("diffusion")["trend"] if row["kind"] == kind}
    if name not in rows:
        known = ", ".join(rows)
        raise ConfigError(f"unknown trend of {kind} '{name}'{suggest(name, rows)}; known: {known}")
    return Trend(**rows[name])


def trend_draws(draws: Draws, trend: Trend) -> Samples:
    """Draws of a trend's rate; each kind is one factor."""
    return two_piece(draws, trend.kind, trend.low, trend.value, trend.high, trend.level)


# --- Draws and text, shared with `replication.py` and `deployment.py`


def two_piece(
    draws: Draws, factor: str, low: float, value: float, high: float, level: float = 0.90
) -> Samples:
    """Draws whose median is `value` and whose interval of this level is exactly low to high.

    Log-normal on both sides, with a width of its own on each: published intervals are rarely even.
    """
    normals = draws.normal(factor)
    deviations = NormalDist().inv_cdf((1 + level) / 2)
    below, above = math.log(value / low) / deviations, math.log(high / value) / deviations
    return value * np.exp(normals * np.where(normals < 0, below, above))


def draws_of_interval(draws: Draws, factor: str, interval: Interval) -> Samples:
    """Draws with the median and the 90 % interval of an interval."""
    return two_piece(draws, factor, interval.p5, interval.p50, interval.p95)


def find_fact(name: str) -> dict[str, Any]:
    """A row of the facts on diffusion."""
    return next(row for row in read_facts("diffusion")["fact"] if row["id"] == name)


def fact_draws(draws: Draws, name: str) -> Samples:
    """Draws of a fact that has an interval; its factor has its name."""
    row = find_fact(name)
    return two_piece(draws, name, row["low"], row["value"], row["high"], row["level"])


def fact_interval(name: str) -> Interval:
    """A fact's published interval, as quantiles."""
    return interval_of(fact_draws(Draws(0), name))


def format_usd(usd: float) -> str:
    """Dollars with three digits: '240 $', '12.3 k$', '1.70 M$'; what is under a cent as such."""
    if 0 < usd < 0.01:
        return "under 0.01 $"
    text = format_count(usd)
    return f"{text}$" if text[-1].isalpha() else f"{text} $"


def usd_text(interval: Interval) -> str:
    """Median and 90 % interval: '12.0 M$ (5.00 M$ to 33.0 M$)'."""
    return f"{format_usd(interval.p50)} ({format_usd(interval.p5)} to {format_usd(interval.p95)})"


def count_text(interval: Interval, unit: str = "") -> str:
    """Median and 90 % interval of a count: '812 k (650 k to 1.02 M)'."""
    low, middle, high = (format_count(x) for x in (interval.p5, interval.p50, interval.p95))
    return f"{middle} ({low} to {high}){f' {unit}' if unit else ''}"


def describe_capability(cost: CapabilityCost) -> str:
    """The cost by year, and under it what it rests on."""
    lines = [
        "what the same capability costs, USD of the final run's compute: median (90 % interval)",
        "",
    ]
    for year, usd in cost.usd_by_year.items():
        within = cost.first_data_year <= year <= cost.last_data_year
        beyond = "" if within else "  beyond the data"
        share = usd.p50 / cost.start_usd.p50
        lines.append(f"  {year:<8g} {usd_text(usd):<40} {100 * share:>8.3g} % of the start{beyond}")
    other = "blog" if cost.algorithms.id == "paper" else "paper"
    return "\n".join(
        [
            *lines,
            "",
            f"  cheaper hardware   {cost.price_performance.text}",
            f"  better algorithms  {cost.algorithms.text}",
            f"  the same authors   {find_trend(other, 'algorithms').text}",
            f"  The trends rest on {cost.first_data_year} to {cost.last_data_year}. A draw keeps "
            "one rate for all years: the low end is the fastest rate, year after year.",
        ]
    )


def capability_figures(cost: CapabilityCost) -> dict[str, Any]:
    """For JSON; dollars, years."""
    return {
        "start_year": cost.start_year,
        "start_usd": cost.start_usd.as_dict(),
        "usd_by_year": {f"{year:g}": usd.as_dict() for year, usd in cost.usd_by_year.items()},
        "price_performance": cost.price_performance.text,
        "algorithms": cost.algorithms.text,
        "data_years": [cost.first_data_year, cost.last_data_year],
    }


# --- Forecasts against what came


def back_test() -> tuple[ScoredForecast, ...]:
    """Every forecast of the table, scored where something has come."""
    return tuple(_score(row) for row in read_facts("diffusion")["forecast"])


def _score(row: dict[str, Any]) -> ScoredForecast:
    """A hit where the outcome reaches into the interval, a miss where it does not."""
    low, high, text = _forecast_range(row)
    outcome: list[float] | None = row.get("outcome")
    verdict = "open"
    if outcome is not None:
        verdict = "hit" if outcome[0] <= high and outcome[1] >= low else "miss"
    return ScoredForecast(
        id=row["id"],
        what=row["what"],
        forecast=text,
        source=row["source"],
        outcome="" if outcome is None else f"{row['outcome_year']}: {_range_text(*outcome)}",
        outcome_source=row.get("outcome_source", ""),
        verdict=verdict,
    )


def _forecast_range(row: dict[str, Any]) -> tuple[float, float, str]:
    """Least and most that the forecast allows, and its text."""
    if "trend" in row:
        rows = {each["id"]: each for each in read_facts("diffusion")["trend"]}
        trend = Trend(**rows[row["trend"]])
        doublings = trend_draws(Draws(0), trend)
        doublings = (row["to_year"] - row["from_year"]) / doublings
        if trend.kind == "algorithms":
            doublings = -12 * doublings
        found = interval_of(np.exp2(doublings))
        return found.p5, found.p95, f"{found.p50:.3g} ({_range_text(found.p5, found.p95)}, 90 %)"
    if "most" in row:
        return -math.inf, row["most"], f"at most {_number_text(row['most'])} before {row['until']}"
    value = _number_text(row["value"])
    if "low" not in row:
        return row["value"], row["value"], f"{value} (no interval printed)"
    interval = f"{_range_text(row['low'], row['high'])}, {100 * row['level']:.0f} %"
    return row["low"], row["high"], f"{value} ({interval})"


def _number_text(value: float) -> str:
    """Years and ratios as they are, large amounts with their unit."""
    return f"{value:.3g}" if value < 1000 else f"{value:g}" if value < 1e4 else format_count(value)


def _range_text(low: float, high: float) -> str:
    if low == high:
        return _number_text(low)
    if math.isinf(high):
        return f"above {_number_text(low)}"
    return f"{_number_text(low)} to {_number_text(high)}"


def describe_back_test(scored: tuple[ScoredForecast, ...]) -> str:
    """Hits, misses and what is still open, a forecast in two lines."""
    counts = {
        verdict: sum(each.verdict == verdict for each in scored)
        for verdict in ("hit", "miss", "open")
    }
    lines = [f"forecasts: {counts['hit']} hits, {counts['miss']} misses, {counts['open']} open", ""]
    for each in scored:
        lines.append(f"  {each.verdict:<5} {each.what}: {each.forecast}  [{each.source}]")
        if each.outcome:
            lines.append(f"        came {each.outcome}  [{each.outcome_source}]")
    return "\n".join(lines)


def back_test_figures(scored: tuple[ScoredForecast, ...]) -> dict[str, Any]:
    """For JSON."""
    keys = ScoredForecast.__slots__
    return {"forecasts": [{key: getattr(each, key) for key in keys} for each in scored]}
