"""`lascaux bench` from words to figures: what it listens to, and what it found in words."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lascaux.bench.describe import describe_generation, describe_training
from lascaux.bench.experts import ExpertSpeed, describe_experts
from lascaux.bench.generation import GenerationSpeed
from lascaux.bench.training import TrainingSpeed
from lascaux.config.load import read_flags
from lascaux.errors import ConfigError

Speed = TrainingSpeed | GenerationSpeed | list[ExpertSpeed]

HEARD = {
    "train": ("model.", "train.", "optimizer."),
    "generate": (
        "model.",
        "train.device",
        "train.allocator",
        "generate.weights",
        "generate.threads",
    ),
    "moe": ("train.device", "train.threads", "train.allocator", "train.precision"),
}


def check_bench_flags(what: str, flags: Sequence[str]) -> None:
    """Refuse settings that a benchmark does not read."""
    for key in read_flags(flags):
        if not key.startswith(HEARD[what]):
            raise ConfigError(f"--{key} has no effect on `lascaux bench {what}`")


def bench_figures(speed: Speed) -> dict[str, Any]:
    """The figures by name."""
    if isinstance(speed, list):
        return {"layers": [dataclasses.asdict(one) for one in speed]}
    return dataclasses.asdict(speed)


def describe_bench(speed: Speed) -> str:
    """The figures as a person reads them."""
    if isinstance(speed, list):
        return describe_experts(speed)
    if isinstance(speed, TrainingSpeed):
        return describe_training(speed)
    return describe_generation(speed)
