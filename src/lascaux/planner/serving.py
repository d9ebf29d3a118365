"""How fast an instance of devices serves a model, and the requests of a day.

A step of an instance makes one token of each request of its batch. It reads the weights and the
cache from memory, then multiplies: the two limits add up, divided by a utilization, which is how
BLOOM on eight A100 was measured to behave (`facts/diffusion.toml`, serving_measurement). Links
between devices are not priced apart. Weights and cache have two bytes a number.
FLOPs are 2 N_active a token, prompt tokens too, and 4 L d T for attention to T tokens before it.
"""

import math
from dataclasses import dataclass

import numpy as np

from lascaux.config.schema import ModelConfig
from lascaux.errors import ConfigError, suggest
from lascaux.model.accounting import (
    active_matmul_parameters,
    cache_bytes_per_token,
    count_parameters,
    expert_parameters,
)
from lascaux.planner.capability import find_fact, two_piece
from lascaux.planner.devices import Device
from lascaux.planner.facts import read_facts
from lascaux.planner.uncertainty import Draws, Samples
from lascaux.units import format_bytes, format_count

ELEMENT_BYTES = 2
MEMORY_SHARE = 0.9
"""of a device, for weights and cache; the rest is the program's"""
LEAST_BATCH_REQUESTS = 16
MOST_BATCH_REQUESTS = 256
MOST_DEVICES_PER_INSTANCE = 128
STATED_TOKENS = 100
"""prompt and output tokens of a request where nobody says"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSize:
    """What serving needs to know of a model."""

    name: str
    total: float
    met_by_all: float
    """weights of products that every token meets, with the head"""
    routed: float
    """weights of all experts"""
    visited_share: float
    """of the experts, by one token"""
    attention_flops: float
    """forward, for one token and each token before it"""
    cache_bytes: float
    """for each token of a request"""

    @property
    def active(self) -> float:
        """Weights that one token is multiplied with."""
        return self.met_by_all + self.routed * self.visited_share

    def weights_read(self, batch: float) -> float:
        """Weights that a step of so many requests reads: experts that nobody visits are not."""
        return self.met_by_all + self.routed * (1 - (1 - self.visited_share) ** batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Requests of a day."""

    name: str
    requests_per_day: Samples
    prompt_tokens: Samples
    """of one request"""
    output_tokens: Samples
    """of one request"""
    assumptions: tuple[str, ...]


def size_of_model(model: ModelConfig, name: str) -> ModelSize:
    """The size of a configuration."""
    expert = expert_parameters(model, model.expert_width)
    visited = model.experts_per_token * expert * model.num_mixture_layers
    return ModelSize(
        name=name,
        total=count_parameters(model).total,
        met_by_all=active_matmul_parameters(model) - visited,
        routed=model.num_experts * expert * model.num_mixture_layers,
        visited_share=model.experts_per_token / model.num_experts if model.num_experts else 0.0,
        attention_flops=4 * model.num_layers * model.attention_width,
        cache_bytes=cache_bytes_per_token(model, ELEMENT_BYTES),
    )


def size_of_parameters(total: float, active: float | None = None) -> ModelSize:
    """The size of a model of which only parameters are known; attention and cache are left out.

    Raises: ConfigError unless 0 < active <= total.
    """
    active = total if active is None else active
    if not 0 < active <= total or not math.isfinite(total):
        raise ConfigError(
            f"parameters must be above 0 and the active ones no more; got {total:g} and {active:g}"
        )
    idle = total > active
    return ModelSize(
        name=f"{format_count(total)} parameters",
        total=total,
        met_by_all=0.0 if idle else total,
        routed=total if idle else 0.0,
        visited_share=active / total,
        attention_flops=0.0,
        cache_bytes=0.0,
    )


def scenario_traffic(name: str, draws: Draws) -> Traffic:
    """The requests of a scenario, from the inputs of the table.

    Raises: ConfigError with the known scenarios.
    """
    rows = {row["id"]: row for row in read_facts("diffusion")["scenario"]}
    if name not in rows:
        known = ", ".join(rows)
        raise ConfigError(f"unknown scenario '{name}'{suggest(name, rows)}; known: {known}")
    products = {role: np.ones(draws.num_draws) for role in ("requests", "prompt", "output")}
    assumptions: list[str] = []
    for row in rows[name]["input"]:
        stated = find_fact(row["fact"]) if "fact" in row else row
        low, high = stated.get("low", stated["value"]), stated.get("high", stated["value"])
        drawn = np.full(draws.num_draws, float(stated["value"]))
        if low < high:
            drawn = two_piece(draws, row["name"], low, stated["value"], high)
        products[row["role"]] = products[row["role"]] * drawn
        middle, least, most = (format_count(value) for value in (stated["value"], low, high))
        interval = f" ({least} to {most}, 90 %)" if low < high else ""
        label = "assumed; " if stated.get("assumed") else ""
        assumptions.append(f"{row['name']} {middle}{interval} [{label}{stated['source']}]")
    return Traffic(
        name=f"{name}: {rows[name]['what']}",
        requests_per_day=products["requests"],
        prompt_tokens=products["prompt"],
        output_tokens=products["output"],
        assumptions=tuple(assumptions),
    )


def steady_traffic(
    tokens_per_day: float,
    draws: Draws,
    *,
    prompt_tokens: float | None = None,
    output_tokens: float | None = None,
) -> Traffic:
    """So many output tokens a day, in requests of one size.

    Raises: ConfigError for what is not above 0 (a prompt may be empty).
    """
    output = STATED_TOKENS if output_tokens is None else output_tokens
    prompt = STATED_TOKENS if prompt_tokens is None else prompt_tokens
    wanted = {"tokens_per_day": tokens_per_day, "output_tokens": output}
    for key, value in wanted.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{key} must be above 0; got {value:g}")
    if not 0 <= prompt < math.inf:
        raise ConfigError(f"prompt_tokens must be 0 or more; got {prompt:g}")
    ones = np.ones(draws.num_draws)
    label = "" if prompt_tokens is not None and output_tokens is not None else " [assumed]"
    return Traffic(
        name=f"{format_count(tokens_per_day)} output tokens a day",
        requests_per_day=ones * tokens_per_day / output,
        prompt_tokens=ones * prompt,
        output_tokens=ones * output,
        assumptions=(f"{prompt:g} prompt and {output:g} output tokens a request{label}",),
    )


# --- Speed


def devices_of_instance(
    model: ModelSize, device: Device, context: float, stated: int | None, batch: int | None
) -> int:
    """Devices that hold one copy of the model and its requests."""
    if batch is not None and batch < 1:
        raise ConfigError(f"batch_requests must be 1 or more; got {batch}")
    if stated is not None and stated < 1:
        raise ConfigError(f"devices_per_instance must be 1 or more; got {stated}")
    needed = model.total * ELEMENT_BYTES
    needed += (batch or (1 if stated else LEAST_BATCH_REQUESTS)) * context * model.cache_bytes
    usable = device.memory_bytes * MEMORY_SHARE
    most = stated or MOST_DEVICES_PER_INSTANCE
    if needed > most * usable:
        raise ConfigError(
            f"{model.name} needs {format_bytes(needed)} for weights and cache; {most} x "
            f"{device.id}, the most of an instance, hold {format_bytes(most * usable)}; take more "
            "or larger devices, a smaller batch or a smaller model"
        )
    return stated or 2 ** max(0, math.ceil(math.log2(needed / usable)))


def batch_that_fits(model: ModelSize, device: Device, size: int, context: float) -> int:
    """Requests whose cache fits beside the weights."""
    free = size * device.memory_bytes * MEMORY_SHARE - model.total * ELEMENT_BYTES
    each = context * model.cache_bytes
    most = MOST_BATCH_REQUESTS if each == 0 else int(min(MOST_BATCH_REQUESTS, free // each))
    return max(1, most)


def step_seconds_by_part(
    model: ModelSize, device: Device, size: int, batch: int, traffic: Traffic
) -> dict[str, Samples]:
    """Seconds of a step with nothing lost; a prompt is spread over the tokens that answer it."""
    rate = size * device.reachable(half_precision(device))
    bandwidth = size * device.bandwidth_bytes_per_second
    prompt, output = traffic.prompt_tokens, traffic.output_tokens
    context = prompt + output / 2
    decode = 2 * model.active + model.attention_flops * context
    prefill = prompt / output * (2 * model.active + model.attention_flops * prompt / 2)
    weights = model.weights_read(batch) * ELEMENT_BYTES / bandwidth
    return {
        "weights": np.full(len(prompt), weights),
        "cache": batch * context * model.cache_bytes / bandwidth,
        "products": batch * (decode + prefill) / rate,
    }


def half_precision(device: Device) -> str:
    """The precision it serves in."""
    return "bf16" if "bf16" in device.peak_flops_per_second else "fp16"
