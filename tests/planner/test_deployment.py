"""Serving against measured steps, the stated self-hosting figure and hand-computed rooflines."""

import json
import math

import numpy as np
import pytest

from lascaux.config.load import load_config
from lascaux.config.schema import PlanConfig
from lascaux.errors import ConfigError
from lascaux.planner.capability import find_fact
from lascaux.planner.deployment import (
    Deployment,
    break_even_day,
    deployment_figures,
    deployment_share_of_development,
    describe_deployment,
    plan_deployment,
    split_after_a_year,
)
from lascaux.planner.devices import find_device
from lascaux.planner.serving import (
    ModelSize,
    scenario_traffic,
    size_of_model,
    size_of_parameters,
    steady_traffic,
    step_seconds_by_part,
)
from lascaux.planner.uncertainty import Draws, Interval

A100 = find_device("A100-80GB-SXM")
STATED_PRICE = PlanConfig(price_usd_per_device_hour=1.25, price_date="2022-12")


@pytest.fixture
def draws() -> Draws:
    return Draws(0)


def bloom() -> ModelSize:
    return size_of_model(load_config("bloom-176b").model, "bloom-176b")


def self_hosted(draws: Draws) -> Deployment:
    """150e6 words a day are about 200e6 tokens; 10 dollars an hour for eight devices."""
    traffic = steady_traffic(2e8, draws, prompt_tokens=0, output_tokens=100)
    return plan_deployment(bloom(), A100, traffic, draws, plan=STATED_PRICE, busy_share=1)


@pytest.mark.parametrize(
    ("batch", "milliseconds_per_token"),
    [(1, 44.02), (8, 5.70), (16, 3.01), (32, 1.68), (64, 1.00), (128, 0.69)],
)
def test_measured_steps_of_bloom(draws: Draws, batch: int, milliseconds_per_token: float) -> None:
    """Bekman and Gugger 2022, fp16 on eight A100: one utilization explains every batch."""
    traffic = steady_traffic(1e6, draws, prompt_tokens=0, output_tokens=100)
    parts = step_seconds_by_part(bloom(), A100, 8, batch, traffic)
    ideal = sum(float(part[0]) for part in parts.values())
    assert ideal / (batch * milliseconds_per_token / 1000) == pytest.approx(0.50, abs=0.02)


def test_roofline_by_hand(draws: Draws) -> None:
    """1e9 parameters, batch 2, no prompt: 2e9 bytes of weights and 4e9 FLOPs a step."""
    traffic = steady_traffic(1e6, draws, prompt_tokens=0, output_tokens=10)
    parts = step_seconds_by_part(size_of_parameters(1e9), A100, 1, 2, traffic)
    assert parts["weights"][0] == pytest.approx(2e9 / 2.04e12)
    assert parts["products"][0] == pytest.approx(4e9 / 271.2e12)
    assert parts["cache"][0] == 0


def test_self_hosted_bloom(draws: Draws) -> None:
    found = self_hosted(draws)
    assert found.devices_per_instance == 8
    speed, usd = found.tokens_per_second_per_instance, found.usd_per_day
    assert speed.p5 < 2300 < speed.p95
    assert usd.p5 < 240 < usd.p95
    assert usd.p50 == pytest.approx(240, rel=0.35)
    assert found.usd_per_million_tokens.p95 < 20  # the API's price list: far dearer than hosting


def test_api_price_in_facts(draws: Draws) -> None:
    """4,000 dollars bought about 150e6 words, by the tokens of a word that scenarios use."""
    usd = find_fact("gpt3-api-usd-per-million-tokens")["value"]
    words = find_fact("bloom-self-hosted-words-per-day")["value"]
    assert words * find_fact("tokens-per-word")["value"] * usd / 1e6 == pytest.approx(
        4000, rel=0.01
    )
    text = describe_deployment(self_hosted(draws))
    assert "20 $ a million in 2022" in text
    assert "1.20 $ a million: 240 USD a day for 150e6 words" in text


def test_cost_per_token_never_rises_with_the_batch(draws: Draws) -> None:
    traffic = steady_traffic(1e10, draws, prompt_tokens=0, output_tokens=100)
    usd = [
        plan_deployment(
            bloom(), A100, traffic, draws, plan=STATED_PRICE, batch_requests=batch, busy_share=1
        ).usd_per_million_tokens.p50
        for batch in (1, 4, 16, 64)
    ]
    assert usd == sorted(usd, reverse=True)
    assert usd[0] > 10 * usd[-1]


def test_experts_nobody_visits_are_not_read() -> None:
    model = size_of_model(load_config("mixtral-8x7b").model, "mixtral")
    assert model.weights_read(1) == pytest.approx(model.active)
    assert model.active < model.weights_read(4) < model.weights_read(64)
    assert model.weights_read(64) == pytest.approx(model.met_by_all + model.routed, rel=1e-6)
    dense = size_of_parameters(1e9)
    assert dense.weights_read(1) == dense.weights_read(64) == 1e9
    assert size_of_parameters(8e9, 2e9).weights_read(1) == pytest.approx(2e9)


def test_one_instance_is_rented_at_least(draws: Draws) -> None:
    traffic = steady_traffic(1000, draws)
    found = plan_deployment(size_of_parameters(6e9), A100, traffic, draws)
    assert found.device_hours_per_day.p50 == found.device_hours_per_day.p95 == 24


def test_more_traffic_costs_in_proportion(draws: Draws) -> None:
    costs = [
        plan_deployment(bloom(), A100, steady_traffic(n, draws), draws).usd_per_day.p50
        for n in (1e11, 2e11)
    ]
    assert costs[1] == pytest.approx(2 * costs[0])


def test_year_of_the_price_counts(draws: Draws) -> None:
    costs = {
        year: plan_deployment(
            bloom(), A100, steady_traffic(1e11, draws), draws, plan=PlanConfig(year=year)
        ).usd_per_day.p50
        for year in (2022, 2025)
    }
    assert costs[2022] / costs[2025] == pytest.approx(3.67 / 1.89, rel=0.02)


def test_scenarios_by_hand(draws: Draws) -> None:
    """5e6 tweets of 12 words; a million developers on 0.53 of the days, 158 completions of 22."""
    twitter = scenario_traffic("one-percent-of-twitter-for-a-year", draws)
    tokens = np.median(twitter.requests_per_day * twitter.output_tokens)
    assert tokens == pytest.approx(5e6 * 12 * 4 / 3, rel=0.1)
    developers = scenario_traffic("million-developers-for-a-year", draws)
    tokens = np.median(developers.requests_per_day * developers.output_tokens)
    assert tokens == pytest.approx(1e6 * 0.53 * 158 * 22, rel=0.1)
    assert sum("[assumed" in text for text in developers.assumptions) == 4


def test_scenarios_contradict_one_ratio_for_all(draws: Draws) -> None:
    """Words like tweets stay below the development of OPT-175B, completions go far above."""
    development = Interval(4e6, 5e6, 6e6, 7e6, 10e6)
    plan = PlanConfig(year=2022)
    shares = []
    for name in ("one-percent-of-twitter-for-a-year", "million-developers-for-a-year"):
        found = plan_deployment(bloom(), A100, scenario_traffic(name, draws), draws, plan=plan)
        shares.append(break_even_day(found, development, draws).within_a_year)
    assert shares[0] < 0.1
    assert shares[1] > 0.9


def test_break_even_by_hand(draws: Draws) -> None:
    found = self_hosted(draws)
    even = break_even_day(found, 100 * found.samples["usd"], draws)
    assert even.days.p5 == pytest.approx(100)
    assert even.days.p95 == pytest.approx(100)
    assert even.within_a_year == 1
    drawn = break_even_day(found, Interval(1e6, 2e6, 3e6, 4e6, 9e6), draws)
    assert drawn.days.p50 == pytest.approx(3e6 / found.usd_per_day.p50, rel=0.1)
    assert drawn.days.p95 / drawn.days.p5 > 9


def test_split_by_hand(draws: Draws) -> None:
    """2 FLOPs a parameter and token for a year against the FLOPs of training."""
    traffic = steady_traffic(1e9, draws, prompt_tokens=0, output_tokens=100)
    found = plan_deployment(size_of_parameters(1e9), A100, traffic, draws)
    yearly = 365 * 1e9 * 2e9
    split = split_after_a_year(found, A100, yearly, draws)
    training, inference = split.by_compute["training"], split.by_compute["inference"]
    assert training.p50 == pytest.approx(inference.p50)
    assert training.p95 <= 50
    total = sum(share.p50 for share in split.by_compute.values())
    assert total == pytest.approx(100, abs=10)
    heavy = split_after_a_year(found, A100, 100 * yearly, draws)
    assert heavy.by_compute["inference"].p95 < 1


def test_published_splits_and_share_are_printed_with_the_correction(draws: Draws) -> None:
    share = deployment_share_of_development()
    assert (share["value"], share["low"], share["high"], share["level"]) == (0.2, 0.1, 0.68, 0.9)
    found = self_hosted(draws)
    text = describe_deployment(found, split=split_after_a_year(found, A100, 4e23, draws))
    assert "published: 20 % (10 to 68 %, 90 %)" in text
    assert "corrected by its author, 25 February 2023" in text
    assert "experimentation 10, training 20, inference 70" in text
    assert "data 31, experimentation and training 29, inference 40" in text
    assert "inference 60" in text


def test_energy_by_hand(draws: Draws) -> None:
    """An A100 with its share of the server: 280 W was reported (StarCoder), PUE 1.05 to 1.4."""
    found = self_hosted(draws)
    assert found.kwh_per_day is not None
    watts = 1000 * found.kwh_per_day.p50 / found.device_hours_per_day.p50
    assert 280 < watts < 1100


def test_seed_and_json(draws: Draws) -> None:
    first, again = self_hosted(draws), self_hosted(Draws(0))
    assert first.usd_per_day == again.usd_per_day
    assert self_hosted(Draws(1)).usd_per_day != first.usd_per_day
    figures = deployment_figures(first, break_even_day(first, Interval(1, 2, 3, 4, 5), draws))
    assert json.loads(json.dumps(figures))["devices_per_instance"] == 8
    assert "samples" not in figures
    assert figures["published_share"]["corrected"]["when"] == "25 February 2023"


def test_shared_price(draws: Draws) -> None:
    """A caller's "price" factor moves the cost of serving."""
    found = plan_deployment(bloom(), A100, steady_traffic(1e11, draws), draws)
    logs = np.log(found.samples["usd"])
    assert np.corrcoef(logs, draws.normal("price"))[0, 1] > 0.5


@pytest.mark.parametrize("tokens", [0, -5, math.inf, math.nan])
def test_tokens_must_be_above_zero(draws: Draws, tokens: float) -> None:
    with pytest.raises(ConfigError, match="tokens_per_day must be above 0"):
        steady_traffic(tokens, draws)


def test_bad_input(draws: Draws) -> None:
    traffic = steady_traffic(1e6, draws)
    with pytest.raises(ConfigError, match="did you mean 'one-percent-of-twitter-for-a-year'"):
        scenario_traffic("one-percent-of-twiter-for-a-year", draws)
    with pytest.raises(ConfigError, match=r"bloom-176b needs .* GiB .* 4 x A100"):
        plan_deployment(bloom(), A100, traffic, draws, devices_per_instance=4)
    with pytest.raises(ConfigError, match="needs"):
        plan_deployment(size_of_parameters(1e15), A100, traffic, draws)
    with pytest.raises(ConfigError, match="no rental price of MI300X is known"):
        plan_deployment(bloom(), find_device("MI300X"), traffic, draws)
    with pytest.raises(ConfigError, match="busy_share"):
        plan_deployment(bloom(), A100, traffic, draws, busy_share=1.5)
    with pytest.raises(ConfigError, match="batch_requests"):
        plan_deployment(bloom(), A100, traffic, draws, batch_requests=0)
    with pytest.raises(ConfigError, match="active ones"):
        size_of_parameters(1e9, 2e9)
    with pytest.raises(ConfigError, match="prompt_tokens"):
        steady_traffic(1e6, draws, prompt_tokens=-1)
    found = plan_deployment(bloom(), A100, traffic, draws)
    with pytest.raises(ConfigError, match="above 0 USD"):
        break_even_day(found, Interval(0, 1, 2, 3, 4), draws)
    with pytest.raises(ConfigError, match="training_flops"):
        split_after_a_year(found, A100, 0, draws)
