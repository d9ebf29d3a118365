"""`lascaux plan deploy`, `replicate` and `capability`: from a configuration to their answers."""

from collections.abc import Sequence
from typing import Any

from lascaux.config.schema import Config
from lascaux.errors import ConfigError, suggest
from lascaux.planner.capability import (
    back_test,
    back_test_figures,
    capability_cost,
    capability_figures,
    describe_back_test,
    describe_capability,
    fact_interval,
)
from lascaux.planner.command import Answer
from lascaux.planner.deployment import (
    break_even_day,
    deployment_figures,
    describe_deployment,
    plan_deployment,
    split_after_a_year,
)
from lascaux.planner.devices import find_device
from lascaux.planner.plan import make_plan
from lascaux.planner.replication import (
    describe_one_ruler,
    describe_replication,
    replicate,
    replication_figures,
    systems,
    utilization_on_one_ruler,
)
from lascaux.planner.serving import scenario_traffic, size_of_model, steady_traffic
from lascaux.planner.uncertainty import Draws

STARTS = {"gpt-3": ("gpt3-final-run-usd", 2020), "opt-175b": ("opt175b-final-run-usd", 2022)}


def deploy(config: Config, words: Sequence[str]) -> Answer:
    """What using a model costs; with `--devices`, when that passes the cost of training it there.

    Raises: ConfigError without a device, or without a use.
    """
    settings = config.plan
    if settings.device is None:
        raise ConfigError("`lascaux plan deploy` needs --device; see `lascaux plan devices`")
    if (settings.scenario is None) == (settings.tokens_per_day is None):
        raise ConfigError(
            "`lascaux plan deploy` needs a use: --plan.tokens_per_day=N, or --plan.scenario="
            "one-percent-of-twitter-for-a-year or million-developers-for-a-year"
        )
    device, draws = find_device(settings.device), Draws(settings.seed)
    if settings.scenario is not None:
        traffic = scenario_traffic(settings.scenario, draws)
    else:
        assert settings.tokens_per_day is not None
        traffic = steady_traffic(settings.tokens_per_day, draws)
    model = size_of_model(config.model, words[0] if words else "tiny")
    found = plan_deployment(model, device, traffic, draws, plan=settings)
    even = split = None
    if settings.devices is not None:
        plan = make_plan(config)
        cost = plan.bill.cost_usd["on_demand"]
        if cost is not None:
            even = break_even_day(found, cost * plan.project_factor, draws)
        split = split_after_a_year(found, device, plan.training_flops, draws)
    figures = deployment_figures(found, even, split)
    return figures, lambda: print(describe_deployment(found, even, split))


def replication(system: str | None, config: Config) -> Answer:
    """The card of a system, or of all with GPT-3 and OPT-175B on one ruler."""
    if system is not None and system not in systems():
        raise ConfigError(
            f"no card of '{system}'{suggest(system, systems())}; known: {', '.join(systems())}"
        )
    names = systems() if system is None else (system,)
    cards = [
        replicate(name, Draws(config.plan.seed), devices_now=config.plan.devices) for name in names
    ]
    figures: dict[str, Any] = {card.system: replication_figures(card) for card in cards}
    texts = [describe_replication(card) for card in cards]
    if system is None:
        texts.append(describe_one_ruler(utilization_on_one_ruler()))
    return figures, lambda: print("\n\n".join(texts))


def capability(system: str, config: Config) -> Answer:
    """The cost of what a system could do over the years, and how such forecasts fared."""
    if system not in STARTS:
        raise ConfigError(
            f"no starting cost of '{system}'{suggest(system, STARTS)}; known: {', '.join(STARTS)}"
        )
    fact, year = STARTS[system]
    found = capability_cost(
        fact_interval(fact), year, config.plan.years_ahead, Draws(config.plan.seed)
    )
    tested = back_test()
    figures = capability_figures(found) | {"back_test": back_test_figures(tested)}
    text = f"{describe_capability(found)}\n\n{describe_back_test(tested)}"
    return figures, lambda: print(text)
