"""The cost of a capability by hand, the limits of its trends, and the forecasts that came due."""

import json
import math

import numpy as np
import pytest

from lascaux.errors import ConfigError
from lascaux.planner.capability import (
    back_test,
    back_test_figures,
    capability_cost,
    capability_figures,
    describe_back_test,
    describe_capability,
    fact_interval,
    format_usd,
    two_piece,
)
from lascaux.planner.uncertainty import Draws, Interval, interval_of

GPT3 = fact_interval("gpt3-final-run-usd")
SURE = Interval(1e6, 1e6, 1e6, 1e6, 1e6)


def test_start_is_the_published_interval() -> None:
    cost = capability_cost(GPT3, 2020, 0, Draws(0))
    start = cost.usd_by_year[2020]
    assert (start.p5, start.p50, start.p95) == pytest.approx((5e6, 12e6, 33e6), rel=0.01)


def test_median_by_hand() -> None:
    """After two years at 2.07 years and 8 months: 2^-(0.966 + 3) of the start."""
    cost = capability_cost(SURE, 2020, 2, Draws(0), algorithms="blog")
    assert cost.usd_by_year[2022].p50 == pytest.approx(1e6 * 2 ** -(2 / 2.07 + 24 / 8), rel=0.15)


def test_intervals_by_hand() -> None:
    """With algorithms alone in sight: the slow end is 22 months, the fast end 2."""
    year = capability_cost(SURE, 2020, 1, Draws(0)).usd_by_year[2021]
    assert 2 ** -(1 / 1.54 + 12 / 2) < year.p5 / 1e6 < 2 ** -(12 / 2)
    assert 2 ** -(1 / 1.54 + 12 / 22) < year.p95 / 1e6 < 2 ** -(12 / 22)


def test_the_wider_interval_is_the_default() -> None:
    wide = capability_cost(SURE, 2020, 3, Draws(0)).usd_by_year[2023]
    narrow = capability_cost(SURE, 2020, 3, Draws(0), algorithms="blog").usd_by_year[2023]
    assert wide.p95 > narrow.p95 and wide.p5 < narrow.p5


def test_cost_only_falls_and_the_interval_only_widens() -> None:
    years = list(capability_cost(GPT3, 2020, 10, Draws(0)).usd_by_year.values())
    medians = [usd.p50 for usd in years]
    widths = [math.log(usd.p95 / usd.p5) for usd in years]
    assert medians == sorted(medians, reverse=True)
    assert widths == sorted(widths)


def test_faster_hardware_trend_costs_less() -> None:
    costs = {
        trend: capability_cost(SURE, 2015, 8, Draws(0), price_performance=trend)
        .usd_by_year[2023]
        .p50
        for trend in ("gpu-ml", "gpu-all", "gpu-top")
    }
    assert costs["gpu-ml"] < costs["gpu-all"] < costs["gpu-top"]


@pytest.mark.parametrize(("start", "ahead"), [(2020, 15), (2023, 12), (1990, 1), (2040, 0)])
def test_no_further_than_the_data(start: float, ahead: int) -> None:
    with pytest.raises(ConfigError, match=r"the trends rest on 2012 to 2023.*2001 to 2034"):
        capability_cost(GPT3, start, ahead, Draws(0))


def test_as_far_as_the_data_span() -> None:
    assert 2034 in capability_cost(GPT3, 2023, 11, Draws(0)).usd_by_year


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="did you mean 'gpu-ml'"):
        capability_cost(GPT3, 2020, 1, Draws(0), price_performance="gpu-mll")
    with pytest.raises(ConfigError, match="known: paper, blog"):
        capability_cost(GPT3, 2020, 1, Draws(0), algorithms="gpu-ml")
    with pytest.raises(ConfigError, match="years_ahead"):
        capability_cost(GPT3, 2020, -1, Draws(0))
    with pytest.raises(ConfigError, match="above 0 USD"):
        capability_cost(Interval(-1, 0, 1, 2, 3), 2020, 1, Draws(0))


def test_text_has_both_levels_and_versions() -> None:
    text = describe_capability(capability_cost(GPT3, 2020, 5, Draws(0)))
    assert "8 (2 to 22 at 90 %)" in text and "NeurIPS text" in text
    assert "8 (5 to 14 at 95 %)" in text and "web summary" in text
    assert "2.07 (1.54 to 3.13 at 95 %)" in text
    assert "2012 to 2023" in text
    lines = [line for line in text.splitlines() if line.startswith("  20")]
    assert len(lines) == 6
    assert all(" to " in line for line in lines)
    assert [line.endswith("beyond the data") for line in lines] == [False] * 4 + [True] * 2


def test_json_and_seed() -> None:
    cost = capability_cost(GPT3, 2020, 2, Draws(5))
    figures = json.loads(json.dumps(capability_figures(cost)))
    assert figures["usd_by_year"]["2022"]["p50"] == cost.usd_by_year[2022].p50
    assert capability_cost(GPT3, 2020, 2, Draws(5)) == cost
    assert capability_cost(GPT3, 2020, 2, Draws(6)) != cost


def test_two_piece_keeps_all_three_figures() -> None:
    found = interval_of(two_piece(Draws(0), "x", 5, 12, 33))
    assert (found.p5, found.p50, found.p95) == pytest.approx((5, 12, 33), rel=0.01)
    wide = two_piece(Draws(0), "x", 1.54, 2.07, 3.13, 0.95)
    assert np.percentile(wide, [2.5, 97.5]) == pytest.approx([1.54, 3.13], rel=0.01)


def test_verdicts() -> None:
    verdicts = {each.id: each.verdict for each in back_test()}
    assert verdicts["cost-start-of-2025"] == "hit"
    assert verdicts["100-million-not-before-2030"] == "miss"
    assert verdicts["deployment-a-fifth-of-development"] == "miss"
    assert verdicts["a100-over-v100"] == "hit"
    assert verdicts["one-billion-run"] == "open"


def test_back_test_text_and_json() -> None:
    scored = back_test()
    text = describe_back_test(scored)
    hits, misses = (sum(each.verdict == word for each in scored) for word in ("hit", "miss"))
    assert f"{hits} hits, {misses} misses" in text
    assert "380 M (55.0 M to 1.50 B, 90 %)" in text and "301 M to 507 M" in text
    assert "at most 100 M before 2030" in text
    figures = json.loads(json.dumps(back_test_figures(scored)))
    assert len(figures["forecasts"]) == len(scored)


@pytest.mark.parametrize(
    ("usd", "text"), [(240, "240 $"), (1.7e6, "1.70 M$"), (0.001, "under 0.01 $"), (0, "0 $")]
)
def test_dollars(usd: float, text: str) -> None:
    assert format_usd(usd) == text
