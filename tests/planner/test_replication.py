"""Replication cards against the published costs, days and ratios."""

import json

import pytest

from lascaux.errors import ConfigError
from lascaux.planner.replication import (
    describe_one_ruler,
    describe_replication,
    project_factor,
    replicate,
    replication_figures,
    systems,
    utilization_on_one_ruler,
)
from lascaux.planner.uncertainty import Draws, interval_of


@pytest.fixture
def draws() -> Draws:
    return Draws(0)


def test_systems() -> None:
    known = ("gpt-3", "gpt-j", "opt-175b", "bloom", "switch-c", "stable-diffusion")
    assert systems() == known


@pytest.mark.parametrize(
    ("system", "ledger", "low", "high", "project_low", "project_high"),
    [
        ("gpt-3", "on_demand", 5e6, 33e6, 15e6, 130e6),
        ("opt-175b", "one_year", 1.5e6, 2.3e6, 4e6, 10e6),
    ],
)
def test_published_costs(
    draws: Draws,
    system: str,
    ledger: str,
    low: float,
    high: float,
    project_low: float,
    project_high: float,
) -> None:
    """Cottier 2022, table 1: the median falls into each published interval."""
    card = replicate(system, draws)
    assert card.price_that_fits == ledger
    assert low < card.then.usd[ledger].p50 < high
    assert project_low < card.project_usd.p50 < project_high
    assert (card.published["final_run"].p5, card.published["final_run"].p95) == pytest.approx(
        (low, high), rel=0.01
    )


def test_opt_fits_a_commitment_and_not_the_price_on_demand(draws: Draws) -> None:
    card = replicate("opt-175b", draws)
    assert card.then.usd["on_demand"].p50 > 2.3e6
    assert card.then.usd["committed"].p50 < 1.5e6
    assert "one-year commitment" in card.note


def test_four_prices_of_gpt3(draws: Draws) -> None:
    """4.3 M$ by three years, 2.1 to 3.3 M$ amortised (Epoch AI): ours hold both."""
    usd = replicate("gpt-3", draws).then.usd
    assert usd["committed"].p5 < 4.3e6 < usd["committed"].p95
    assert usd["amortised"].p5 < 3.3e6 and usd["amortised"].p95 > 2.1e6
    assert usd["purchase"].p5 < 242e6 < usd["purchase"].p95


def test_golden_run_gpt_j(draws: Draws) -> None:
    card = replicate("gpt-j", draws)
    assert card.ideal_days_then is not None
    assert card.tokens == 383_500 * 2**20
    assert card.flops_recomputed == pytest.approx(1.5e22, rel=0.05)
    assert card.flops_printed == 1.5e22
    assert card.ideal_days_then == pytest.approx(1.46e22 / 5.4e15 / 86400, rel=0.01)
    assert card.ideal_days_then == pytest.approx(31, abs=0.5)
    assert card.expected_days_then is not None
    assert card.ideal_days_then < 35 < card.expected_days_then.p95
    assert card.expected_days_then.p5 < 35
    assert card.then.usd["on_demand"].p50 == pytest.approx(128 * 840 * 2.00, rel=0.02)
    assert card.then.device_hours.p50 == pytest.approx(128 * 840, rel=0.01)


@pytest.mark.parametrize(
    ("system", "flops"),
    [("gpt-3", 3.14e23), ("gpt-j", 1.5e22), ("opt-175b", 3.15e23), ("bloom", 6 * 176e9 * 366e9)],
)
def test_recomputed_flops(draws: Draws, system: str, flops: float) -> None:
    """Attention and the head lie between 6 N D and a tenth more."""
    recomputed = replicate(system, draws).flops_recomputed
    assert recomputed is not None
    assert 1.0 <= recomputed / flops < 1.1


def test_one_ruler() -> None:
    ruler = utilization_on_one_ruler()
    assert ruler.as_printed == pytest.approx(0.47 / 0.21)
    assert ruler.low == pytest.approx(0.353 / 0.213, rel=0.01)
    assert ruler.high == pytest.approx(0.353 / 0.202, rel=0.01)
    assert ruler.low < 1.7 < ruler.high < 2
    assert "2.2 as printed" in describe_one_ruler(ruler)


def test_bloom_and_the_others(draws: Draws) -> None:
    bloom = replicate("bloom", draws)
    assert bloom.then.device_hours.p5 == bloom.then.device_hours.p95 == 1_082_990
    assert bloom.utilization_then == pytest.approx(0.326, abs=0.005)
    switch = replicate("switch-c", draws)
    rate = 34.4e12 * 1024 * 27 * 86400  # the printed total is rate x chips x days
    assert switch.flops_printed == pytest.approx(rate, rel=0.01)
    assert switch.flops_for_now == switch.flops_printed
    diffusion = replicate("stable-diffusion", draws)
    assert diffusion.flops_recomputed is None and diffusion.preset is None
    assert diffusion.flops_for_now == 5e22
    usd = diffusion.then.usd["on_demand"]
    assert usd.p5 < 600_000 < usd.p95


def test_now_by_hand(draws: Draws) -> None:
    """FLOPs over 30 % of 989.4 TFLOP/s, at 2.99 dollars an hour."""
    card = replicate("gpt-3", draws, devices_now=1000)
    assert card.flops_recomputed is not None
    hours = card.flops_recomputed / (0.30 * 989.4e12) / 3600
    assert card.now.device_hours.p50 == pytest.approx(hours, rel=0.01)
    assert card.now.device_hours.p5 == pytest.approx(hours * 0.30 / 0.47, rel=0.02)
    assert card.now.device_hours.p95 == pytest.approx(hours * 0.30 / 0.105, rel=0.02)
    assert card.now.days.p50 == pytest.approx(hours / 1000 / 24, rel=0.01)
    assert card.now.usd["on_demand"].p50 == pytest.approx(hours * 2.99, rel=0.2)
    assert card.now.usd["on_demand"].p50 < card.then.usd["on_demand"].p50 / 5


def test_people_and_months(draws: Draws) -> None:
    gpt3, opt = replicate("gpt-3", draws), replicate("opt-175b", draws)
    assert (gpt3.people, gpt3.people_days) == (25, 92)
    assert (opt.people, opt.people_days, opt.months_after_gpt3) == (11, 78, 23)
    assert "not known" in describe_replication(replicate("bloom", draws))


def test_project_factors(draws: Draws) -> None:
    gpt3 = interval_of(project_factor(draws, "GPT-3"))
    assert (gpt3.p5, gpt3.p50, gpt3.p95) == pytest.approx((1.14, 4.1, 5.6), rel=0.01)
    opt = interval_of(project_factor(draws, "OPT-175B"))
    assert (opt.p5, opt.p50, opt.p95) == pytest.approx((2.0, 3.5, 5.6), rel=0.01)
    assert interval_of(project_factor(draws, None)).p5 >= 1


@pytest.mark.parametrize("system", systems())
def test_text_and_json(system: str, draws: Draws) -> None:
    card = replicate(system, draws)
    text = describe_replication(card)
    assert all(
        word in text for word in ("FLOPs" if card.preset else "printed", "on demand", "now:")
    )
    assert max(len(line) for line in text.splitlines()) < 200
    figures = json.loads(json.dumps(replication_figures(card)))
    assert figures["now"]["device"] == "H100-80GB-SXM"
    assert figures["then"]["usd"]["on_demand"]["p50"] == card.then.usd["on_demand"].p50


def test_seed() -> None:
    first, again, other = (replicate("gpt-3", Draws(seed)).project_usd for seed in (3, 3, 4))
    assert first == again != other


def test_bad_input(draws: Draws) -> None:
    with pytest.raises(ConfigError, match="did you mean 'gpt-3'"):
        replicate("gpt3", draws)
    with pytest.raises(ConfigError, match="devices must be 1 or more; got 0"):
        replicate("gpt-3", draws, devices_now=0)
