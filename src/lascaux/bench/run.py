"""A benchmark from config to figures, on the device and with the choices of a training run."""

import dataclasses
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lascaux.bench.generation import GenerationSpeed, bench_generation
from lascaux.bench.training import WARM_UP_STEPS, TrainingSpeed, bench_training
from lascaux.config.schema import Config
from lascaux.train.machine import choose_precision, prepare_device
from lascaux.train.state import check_memory


def run_bench(
    what: Literal["train", "generate"], config: Config, rounds: int, console: Console
) -> TrainingSpeed | GenerationSpeed:
    """Measure; a progress bar goes to the console.

    Raises: ConfigError for a device that is not there or too small.
    """
    device = prepare_device(config.train)
    check_memory(config, device)
    if config.train.precision == "auto":
        precision = choose_precision(device)
        train = dataclasses.replace(config.train, precision=precision)
        config = dataclasses.replace(config, train=train)
    columns = (
        TextColumn(f"bench {what}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=rounds + WARM_UP_STEPS)
        if what == "train":
            return bench_training(config, device, rounds, lambda: progress.advance(task))
        return bench_generation(config.model, device, rounds, lambda: progress.advance(task))
