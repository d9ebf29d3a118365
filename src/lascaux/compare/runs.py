"""The runs of a study: some at a time, each a `lascaux train` of its own that can be continued.

STUDY/MODEL-seedN.toml is the config of a run, STUDY/MODEL-seedN/ its folder, MODEL-seedN.log what
it said. A run that has finished is left alone.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from lascaux.compare.study import Study, with_seed
from lascaux.config.check import num_steps
from lascaux.config.load import to_toml
from lascaux.config.schema import Config
from lascaux.errors import CheckpointError, ConfigError, TrainingStopped
from lascaux.model.accounting import flops_per_token
from lascaux.train.loop import with_precision
from lascaux.train.run_folder import read_records, saved_config, settle_config, write_atomically

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_LINES = 30.0


@dataclass(frozen=True, slots=True)
class StudyRun:
    """One model with one seed."""

    model: str
    seed: int
    config: Config
    folder: Path

    @property
    def flops(self) -> int:
        """Work of the whole run; what its share of the progress is measured by."""
        train = self.config.train
        tokens = num_steps(train) * train.batch_tokens
        return flops_per_token(self.config.model, train.seq_len) * tokens

    def steps_done(self) -> int:
        """Steps in the run's records."""
        records = read_records(self.folder / "metrics.jsonl")
        return records[-1]["step"] if records else 0


def list_runs(study: Study, folder: Path) -> list[StudyRun]:
    """Every run, all models of a seed before the next seed.

    Raises: CheckpointError where a run in the folder was made with other settings.
    """
    runs = []
    for seed in study.seeds:
        for model, config in study.models.items():
            place = folder / f"{model}-seed{seed}"
            runs.append(StudyRun(model, seed, _settled(place, with_seed(config, seed)), place))
    return runs


def _settled(folder: Path, config: Config) -> Config:
    if not (folder / "config.toml").exists():
        return config
    if config.train.precision == "auto":
        config = with_precision(config, saved_config(folder).train.precision)
    changes = settle_config(folder, config)
    if changes:
        raise CheckpointError(
            f"{folder} was trained with another configuration ({'; '.join(changes)}); give the "
            "study another --run folder, or the settings it was begun with"
        )
    return config


def train_runs(runs: Sequence[StudyRun], at_once: int, console: Console) -> None:
    """Train what is not finished, `at_once` at a time.

    Raises: ConfigError with what a run said when it failed; TrainingStopped when one was stopped;
    on the way out of any error the others save and stop.
    """
    wanted = {run.folder: num_steps(run.config.train) for run in runs}
    waiting = [run for run in runs if run.steps_done() < wanted[run.folder]]
    running: dict[StudyRun, subprocess.Popen[bytes]] = {}
    with StudyProgress(console, runs, waiting) as progress:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    running[waiting[0]] = _start(waiting[0])
                    waiting.pop(0)
                for run, process in list(running.items()):
                    if process.poll() is not None:
                        del running[run]
                        _check_ended(run, process.returncode)
                        progress.finished(run)
                progress.show(running)
                time.sleep(SECONDS_BETWEEN_LOOKS)
        except BaseException:
            for process in running.values():
                process.send_signal(signal.SIGTERM)
            for process in running.values():
                process.wait()
            raise


def _start(run: StudyRun) -> subprocess.Popen[bytes]:
    """In a session of its own, so that Ctrl-C reaches it once, through us."""
    path = run.folder.with_name(f"{run.folder.name}.toml")
    write_atomically(path, to_toml(run.config))
    command = [sys.executable, "-m", "lascaux", "train", str(path), "--run", str(run.folder)]
    with open(run.folder.with_name(f"{run.folder.name}.log"), "wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def _check_ended(run: StudyRun, code: int) -> None:
    if code == 0:
        return
    log = run.folder.with_name(f"{run.folder.name}.log")
    said = log.read_text(encoding="utf-8", errors="replace").splitlines()
    last = next((line for line in reversed(said) if line.startswith("lascaux: ")), "")
    if code == 75:
        raise TrainingStopped(f"{run.folder.name} was stopped; the same command goes on")
    raise ConfigError(
        f"{run.folder.name} ended with exit code {code}: {last.removeprefix('lascaux: ')} "
        f"(all of it: {log})"
    )


class StudyProgress:
    """Work done and time left over all runs."""

    def __init__(
        self, console: Console, runs: Sequence[StudyRun], waiting: Sequence[StudyRun]
    ) -> None:
        self.console = console
        self._number, self._finished = len(runs), len(runs) - len(waiting)
        left = {run.folder for run in waiting}
        self._done = sum(run.flops for run in runs if run.folder not in left)
        self._total = sum(run.flops for run in runs)
        self._last_line = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            transient=True,
            expand=True,
            speed_estimate_period=300,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=self._total, completed=self._done)

    def __enter__(self) -> "StudyProgress":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def finished(self, run: StudyRun) -> None:
        """A run has ended well."""
        self._finished += 1
        self._done += run.flops
        last = read_records(run.folder / "metrics.jsonl")[-1]
        self._say(
            f"{run.folder.name} · {last.get('bits_per_byte', float('nan')):.3f} bits per byte · "
            f"{self._finished} of {self._number} runs"
        )

    def show(self, running: Iterable[StudyRun]) -> None:
        """How far those that are under way have come."""
        done, names = float(self._done), []
        for run in running:
            done += run.flops * run.steps_done() / num_steps(run.config.train)
            names.append(run.folder.name)
        named = ", ".join(names)
        self._progress.update(self._task, completed=done, description=named)
        quiet_for = time.monotonic() - self._last_line
        if not self.console.is_terminal and quiet_for > SECONDS_BETWEEN_LINES:
            self._say(f"{100 * done / self._total:.0f} % of the work · now {named}")

    def _say(self, text: str) -> None:
        self._last_line = time.monotonic()
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
