"""`lascaux compare` from words to a table and a picture."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from lascaux.compare.describe import describe_outcome
from lascaux.compare.outcome import read_outcome, to_json
from lascaux.compare.picture import draw_outcome
from lascaux.compare.runs import list_runs, train_runs
from lascaux.compare.study import DEFAULT_STUDY, Study, read_study
from lascaux.config.schema import Config, SourceConfig
from lascaux.errors import ConfigError
from lascaux.parallel.hardware import usable_cores
from lascaux.parallel.runtime import this_process
from lascaux.train.loop import open_folder
from lascaux.train.machine import choose_device
from lascaux.train.prepare_data import open_data
from lascaux.train.run_folder import write_atomically

PICTURE, FIGURES = "compare.png", "compare.json"
MOST_AT_ONCE = 4
"""runs, where nothing else is said: each needs memory of its own"""


def run_compare(
    target: str | None,
    flags: Sequence[str],
    folder: Path | None,
    num_seeds: int | None,
    runs_at_once: int | None,
    console: Console,
) -> tuple[str, dict[str, Any]]:
    """Train a study to its end; the table, and the same figures by name.

    Raises: ConfigError for a study that cannot be; TrainingStopped on request, after saving.
    """
    if this_process().world_size > 1:
        raise ConfigError("a study starts its own processes; run it without torchrun")
    study = read_study(target, flags, num_seeds)
    name = Path(target or DEFAULT_STUDY).name.removesuffix(".toml")
    folder = (folder or Path("runs") / name).resolve()
    with ExitStack() as stack:
        open_folder(folder, stack)
        study = share_data(study, folder, console)
        study, at_once = share_cores(study, runs_at_once)
        runs = list_runs(study, folder)
        train_runs(runs, at_once, console)
        outcome = read_outcome(runs)
        draw_outcome(outcome, f"{name}: {len(study.seeds)} seeds", folder / PICTURE)
        figures = to_json(outcome) | {"runs_at_once": at_once, "picture": str(folder / PICTURE)}
        write_atomically(folder / FIGURES, json.dumps(figures, indent=2) + "\n")
    return describe_outcome(outcome, len(study.seeds), at_once), figures


def share_data(study: Study, folder: Path, console: Console) -> Study:
    """The study on data that is prepared once, in its folder, unless it was before."""
    first = next(iter(study.models.values()))
    for name, config in study.models.items():
        if (config.data, config.tokenizer) != (first.data, first.tokenizer):
            raise ConfigError(f"model {name} has other data than the first; a study has one")
        if config.model.vocab_size != first.model.vocab_size:
            raise ConfigError(f"model {name} has another vocabulary than the first")
    prepared = open_data(first, folder, console)
    if folder / "data" not in prepared.folders:
        return study
    data = dataclasses.replace(first.data, sources=(SourceConfig(path=str(folder / "data")),))
    return study_with(study, lambda config: dataclasses.replace(config, data=data))


def share_cores(study: Study, runs_at_once: int | None) -> tuple[Study, int]:
    """The study with threads for each run, and how many runs at once: one on a GPU."""
    first = next(iter(study.models.values()))
    if runs_at_once is not None and runs_at_once < 1:
        raise ConfigError(f"--runs-at-once must be at least 1; got {runs_at_once}")
    if choose_device(first.train).type != "cpu":
        return study, runs_at_once or 1
    cores = usable_cores()
    at_once = runs_at_once or min(MOST_AT_ONCE, max(1, cores // (first.train.threads or 1)))
    threads = first.train.threads or max(1, cores // at_once)

    def with_threads(config: Config) -> Config:
        return dataclasses.replace(config, train=dataclasses.replace(config.train, threads=threads))

    return study_with(study, with_threads), at_once


def study_with(study: Study, change: Callable[[Config], Config]) -> Study:
    """The study with every model's config changed alike."""
    models = {name: change(config) for name, config in study.models.items()}
    return dataclasses.replace(study, models=models)
