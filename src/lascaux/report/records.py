"""What a run wrote down, read back for the report.

Needed: config.toml and metrics.jsonl. Shown if they are there: samples.jsonl, experts.jsonl,
events.jsonl, environment.json, data/index.json and plan.json.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lascaux.config.schema import Config
from lascaux.errors import CheckpointError
from lascaux.train.run_folder import read_records, saved_config

Record = dict[str, Any]

METRICS = (
    "step",
    "tokens_seen",
    "loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "mfu",
    "seconds",
)


PLANNED = (
    "step_seconds",
    "training_seconds",
    "memory",
    "tokens",
    "time_parts_hours",
    "cost_usd",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecords:
    """The records of one run; what it did not write is empty."""

    name: str
    config: Config
    config_toml: str
    metrics: list[Record]
    samples: list[Record]
    expert_loads: list[Record]
    events: list[Record]
    environment: Record
    data_index: Record
    plan: Record


def read_run(run: Path) -> RunRecords:
    """All records of a run; a last line torn by a crash is left out.

    Raises: CheckpointError for a folder without them, naming what to run, and for damage, naming
    file and line.
    """
    config = saved_config(run)
    metrics = read_lines(run / "metrics.jsonl", METRICS)
    for number, record in enumerate(metrics, start=1):
        for key in METRICS:
            if not isinstance(record[key], int | float):
                raise CheckpointError(
                    f"{run / 'metrics.jsonl'}, line {number}: '{key}' must be a number; "
                    f"got {record[key]!r}"
                )
    if not metrics:
        raise CheckpointError(
            f"{run} has no metrics yet, so there is nothing to report: "
            f"`lascaux train --run {run}` trains it"
        )
    return RunRecords(
        name=run.resolve().name,
        config=config,
        config_toml=(run / "config.toml").read_text(encoding="utf-8"),
        metrics=metrics,
        samples=read_lines(run / "samples.jsonl", ("step", "prompt", "text")),
        expert_loads=read_expert_loads(run / "experts.jsonl"),
        events=read_lines(run / "events.jsonl", ("time", "step", "event", "detail")),
        environment=read_object(run / "environment.json"),
        data_index=read_object(run / "data" / "index.json"),
        plan=read_plan(run / "plan.json"),
    )


def read_lines(path: Path, fields: tuple[str, ...]) -> list[Record]:
    """The records of a JSON-lines file, each holding at least `fields`."""
    records = read_records(path)
    for number, record in enumerate(records, start=1):
        missing = [f for f in fields if not isinstance(record, dict) or f not in record]
        if missing:
            raise CheckpointError(
                f"{path}, line {number}: expected an object with {', '.join(fields)}; "
                f"without {', '.join(missing)}"
            )
    return records


def read_expert_loads(path: Path) -> list[Record]:
    """The load of each expert in each mixture layer, at some steps."""
    records = read_lines(path, ("step", "load"))
    shapes = {_shape(record["load"]) for record in records}
    if len(shapes) > 1 or None in shapes:
        raise CheckpointError(
            f"{path}: 'load' must be a list of layers, each a list of numbers, one for each expert "
            "and as many in every line"
        )
    return records


def _shape(load: object) -> tuple[int, int] | None:
    if not isinstance(load, list) or not load or not all(isinstance(row, list) for row in load):
        return None
    widths = {len(row) for row in load}
    numbers = all(isinstance(share, int | float) for row in load for share in row)
    return (len(load), widths.pop()) if len(widths) == 1 and numbers else None


def read_object(path: Path) -> Record:
    """The JSON object in a file; empty where there is no file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def read_plan(path: Path) -> Record:
    """The plan with what the report shows of it; empty where there is none."""
    plan = read_object(path)
    missing = [key for key in PLANNED if key not in plan]
    if plan and missing:
        raise CheckpointError(f"{path}: expected a plan; without {', '.join(missing)}")
    return plan


def elapsed_seconds(metrics: Sequence[Record]) -> list[float]:
    """Wall time at the end of each step, validation included where the run recorded it."""
    elapsed, total = [], 0.0
    for record in metrics:
        total = record.get("elapsed_seconds", total + record["seconds"])
        elapsed.append(total)
    return elapsed
