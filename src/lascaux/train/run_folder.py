"""The folder of a run: its config, machine, metrics, samples and events.

`metrics.jsonl` and `samples.jsonl` are cut back to the checkpoint a run continues from, so they
read as if the run had never been interrupted. `events.jsonl` keeps what really happened.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lascaux.config.load import load_config, to_tables, to_toml
from lascaux.config.schema import Config
from lascaux.errors import CheckpointError, ConfigError
from lascaux.train.machine import Machine

IDENTITY = (
    "model.",
    "data.",
    "tokenizer.",
    "train.batch_tokens",
    "train.microbatch_seqs",
    "train.seq_len",
    "train.seed",
    "train.precision",
    "train.deterministic",
    "optimizer.name",
)
"""Settings that make a run what it is: they cannot change while it is continued."""
FREE = (
    "checkpoint.",
    "evaluate.",
    "generate.",
    "serve.",
    "plan.",
    "train.tracking",
    "train.device",
    "train.threads",
    "train.allocator",
    "train.recompute",
    "train.compile",
)
"""Settings that leave the weights alone or only round them otherwise."""


def settle_config(run: Path, config: Config) -> list[str]:
    """Hold a config against the one the run was started with; return the changes that are allowed.

    Raises: CheckpointError showing the difference where the run would become another one.
    """
    path = run / "config.toml"
    if not path.exists():
        return []
    saved = _flatten(to_tables(load_config(str(path))))
    wanted = _flatten(to_tables(config))
    changed = [key for key in wanted if saved[key] != wanted[key]]
    forbidden = [key for key in changed if key.startswith(IDENTITY)]
    if forbidden:
        width = max(len(key) for key in forbidden)
        rows = "\n".join(
            f"  {key:<{width}}  run: {saved[key]}   now: {wanted[key]}" for key in forbidden
        )
        raise CheckpointError(
            f"{run} was started with another configuration:\n{rows}\n"
            "continue it with its own settings, or start a new run with another --run folder"
        )
    return [f"{key}: {saved[key]} -> {wanted[key]}" for key in changed if not key.startswith(FREE)]


def _flatten(tables: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        f"{name}.{key}": value for name, table in tables.items() for key, value in table.items()
    }


def saved_config(run: Path) -> Config:
    """The config of an existing run.

    Raises: CheckpointError where the folder is no run.
    """
    path = run / "config.toml"
    if not path.exists():
        raise CheckpointError(
            f"{run} is not a run folder: it has no config.toml; "
            f"`lascaux train --run {run}` makes one"
        )
    try:
        return load_config(str(path))
    except ConfigError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that a reader, or a crash, sees the old or the new text, whole."""
    temporary = path.with_name(f".tmp_{path.name}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_config(run: Path, config: Config) -> None:
    """RUN/config.toml."""
    write_atomically(run / "config.toml", to_toml(config))


def write_environment(run: Path, machine: Machine) -> None:
    """RUN/environment.json."""
    text = json.dumps(dataclasses.asdict(machine), indent=2)
    write_atomically(run / "environment.json", text + "\n")


def append_event(run: Path, step: int, event: str, detail: str) -> None:
    """One line in RUN/events.jsonl: start, resume, changed setting, interruption, failed save."""
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "event": event,
        "detail": detail,
    }
    path = run / "events.jsonl"
    whole = path.read_text(encoding="utf-8") if path.exists() else ""
    if whole and not whole.endswith("\n"):  # a crash tore the last line
        write_atomically(path, whole[: whole.rfind("\n") + 1])
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


EXPERT_RECORDS = 200


class StepLog:
    """A JSON-lines file with one record for a step, continued after a given step.

    Records beyond that step, and a line torn by a crash, are dropped: they are made again.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        kept = [record for record in read_records(path) if record["step"] <= last_step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 closed by close()

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record; it reaches the operating system at once."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Make what was appended survive a power cut."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class SilentLog(StepLog):
    """A log of a process that leaves writing to the first one."""

    def __init__(self) -> None:
        """No file."""

    def append(self, record: Mapping[str, Any]) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


@dataclasses.dataclass(frozen=True, slots=True)
class RunLogs:
    """What a run writes down step by step."""

    metrics: StepLog
    samples: StepLog
    experts: StepLog
    """load of each expert, at most EXPERT_RECORDS times in a run"""

    def sync(self) -> None:
        """Make what was appended survive a power cut."""
        for log in (self.metrics, self.samples, self.experts):
            log.sync()

    def close(self) -> None:
        """Close the files."""
        for log in (self.metrics, self.samples, self.experts):
            log.close()


def open_logs(run: Path, last_step: int, config: Config, writes: bool) -> RunLogs:
    """The logs of a run after this step; silent ones for a process that does not write."""

    def log(name: str) -> StepLog:
        return StepLog(run / name, last_step) if writes else SilentLog()

    experts = log("experts.jsonl") if config.model.num_experts else SilentLog()
    return RunLogs(log("metrics.jsonl"), log("samples.jsonl"), experts)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The whole records of a JSON-lines file; a torn last line is left out.

    Raises: CheckpointError naming the line for damage anywhere else.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise CheckpointError(f"{path}, line {number} is not JSON: {error}") from error
    return records
