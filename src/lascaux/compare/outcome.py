"""What came out of a study: each model's curves over its seeds, and its dense equivalent."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lascaux.compare.equivalent import Interval, Scale, equivalent_places, pooled_spread
from lascaux.compare.runs import StudyRun
from lascaux.errors import CheckpointError
from lascaux.model.accounting import active_parameters, count_parameters, flops_per_token
from lascaux.train.run_folder import read_records


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOutcome:
    """One model; curves are of shape (seeds, validations)."""

    name: str
    is_mixture: bool
    parameters: int
    active_parameters: int
    flops_per_token: int
    tokens: NDArray[np.float64]
    """seen at each validation"""
    bits_per_byte: NDArray[np.float64]
    seconds: NDArray[np.float64]
    """since the run began, validations included"""

    @property
    def final(self) -> list[float]:
        """Bits per byte at the end, by seed."""
        return self.bits_per_byte[:, -1].tolist()

    @property
    def mean(self) -> float:
        """Bits per byte at the end, over the seeds."""
        return float(np.mean(self.final))

    @property
    def final_seconds(self) -> float:
        """Of a whole run, over the seeds."""
        return float(self.seconds[:, -1].mean())

    @property
    def flops(self) -> NDArray[np.float64]:
        """Work done at each validation."""
        return self.tokens * self.flops_per_token


@dataclass(frozen=True, slots=True)
class Equivalent:
    """The dense model that would reach the loss of a mixture on the same tokens."""

    parameters: Interval
    flops_per_token: Interval
    seconds: Interval
    smallest: bool
    """the middle is at the smallest dense model: the equivalent may be smaller"""
    largest: bool
    """the middle is at the largest dense model: the equivalent may be larger"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of the whole study; `spread` is the standard deviation between seeds, over all models."""

    models: list[ModelOutcome]
    spread: float
    equivalents: dict[str, Equivalent]

    @property
    def ladder(self) -> list[ModelOutcome]:
        """The dense models by size."""
        return dense_by_size(self.models)


def dense_by_size(models: Sequence[ModelOutcome]) -> list[ModelOutcome]:
    """The dense ones, smallest first."""
    dense = [model for model in models if not model.is_mixture]
    return sorted(dense, key=lambda model: model.parameters)


def read_outcome(runs: Sequence[StudyRun]) -> Outcome:
    """The figures of a finished study.

    Raises: CheckpointError where a run has nothing held out to be judged by.
    """
    names = list(dict.fromkeys(run.model for run in runs))
    models = [read_model([run for run in runs if run.model == name]) for name in names]
    spread, freedom = pooled_spread([model.final for model in models])
    ladder = dense_by_size(models)
    equivalents = {}
    if len(ladder) > 1:
        losses = [model.final for model in ladder]
        for model in models:
            if model.is_mixture:
                places = equivalent_places(losses, model.final, spread, freedom)
                equivalents[model.name] = describe_places(ladder, places)
    return Outcome(models, spread, equivalents)


def describe_places(ladder: Sequence[ModelOutcome], places: Interval) -> Equivalent:
    """Places among dense models as sizes, work and time."""

    def along(values: Sequence[float]) -> Interval:
        scale = Scale(tuple(values))
        return Interval(scale.at(places.p5), scale.at(places.p50), scale.at(places.p95))

    return Equivalent(
        parameters=along([model.parameters for model in ladder]),
        flops_per_token=along([model.flops_per_token for model in ladder]),
        seconds=along([model.final_seconds for model in ladder]),
        smallest=places.p50 <= 0,
        largest=places.p50 >= len(ladder) - 1,
    )


def read_model(runs: Sequence[StudyRun]) -> ModelOutcome:
    """One model from the records of its runs."""
    columns: dict[str, list[list[float]]] = {
        "tokens_seen": [],
        "bits_per_byte": [],
        "elapsed_seconds": [],
    }
    for run in runs:
        records = read_records(run.folder / "metrics.jsonl")
        validated = [record for record in records if record.get("bits_per_byte") is not None]
        if not validated:
            raise CheckpointError(
                f"{run.folder} held nothing out, so there is nothing to compare; give more text, "
                "or a larger --data.valid_fraction"
            )
        for key, rows in columns.items():
            rows.append([record[key] for record in validated])
    config = runs[0].config
    return ModelOutcome(
        name=runs[0].model,
        is_mixture=config.model.num_experts > 0,
        parameters=count_parameters(config.model).total,
        active_parameters=active_parameters(config.model),
        flops_per_token=flops_per_token(config.model, config.train.seq_len),
        tokens=np.array(columns["tokens_seen"][0]),
        bits_per_byte=np.array(columns["bits_per_byte"]),
        seconds=np.array(columns["elapsed_seconds"]),
    )


def to_json(outcome: Outcome) -> dict[str, Any]:
    """Every figure of the table, and by seed; None for what one seed cannot tell."""
    baseline = outcome.models[0]
    models = {}
    for model in outcome.models:
        row: dict[str, Any] = {
            "parameters": model.parameters,
            "active_parameters": model.active_parameters,
            "flops_per_token": model.flops_per_token,
            "tokens": int(model.tokens[-1]),
            "bits_per_byte": model.mean,
            "bits_per_byte_by_seed": model.final,
            "seconds": model.final_seconds,
            "times_seconds_of_first": model.final_seconds / baseline.final_seconds,
        }
        if model.name in outcome.equivalents:
            equal = outcome.equivalents[model.name]
            row["dense_equivalent"] = {
                "parameters": _levels(equal.parameters),
                "flops_per_token": _levels(equal.flops_per_token),
                "seconds": _levels(equal.seconds),
                "may_be_smaller": equal.smallest,
                "may_be_larger": equal.largest,
            }
        models[model.name] = row
    return {"bits_per_byte_spread_of_seeds": _known(outcome.spread), "models": models}


def _levels(interval: Interval) -> dict[str, float | None]:
    return {level: _known(getattr(interval, level)) for level in ("p5", "p50", "p95")}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
