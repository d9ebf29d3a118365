"""A benchmark from config to figures, on the device and with the choices of a training run."""

import dataclasses
from typing import Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lascaux.bench.experts import SHAPES, WARM_UP_ROUNDS, ExpertSpeed, bench_experts
from lascaux.bench.generation import GenerationSpeed, bench_generation, check_generation
from lascaux.bench.training import WARM_UP_STEPS, TrainingSpeed, bench_training
from lascaux.config.schema import Config
from lascaux.errors import ConfigError
from lascaux.generate.load import set_threads
from lascaux.parallel.hardware import choose_precision
from lascaux.parallel.layout import Layout
from lascaux.train.machine import prepare_device
from lascaux.train.precision import DTYPES
from lascaux.train.state import check_memory
from lascaux.train.step import is_out_of_memory

MAX_MICROBATCHES = 4


def run_bench(
    what: Literal["train", "generate", "moe"], config: Config, rounds: int, console: Console
) -> TrainingSpeed | GenerationSpeed | list[ExpertSpeed]:
    """Measure; a progress bar goes to the console.

    Raises: ConfigError for a device that is not there or too small.
    """
    device = prepare_device(config.train)
    columns = (
        TextColumn(f"bench {what}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what)

        def done() -> None:
            progress.advance(task)

        try:
            if what == "moe":
                progress.update(task, total=len(SHAPES) * (rounds + WARM_UP_ROUNDS))
                return bench_experts(device, expert_dtype(config, device), rounds, done)
            if what == "generate":
                check_generation(config.model, device)
                set_threads(config.generate.threads)
                progress.update(task, total=rounds + 1)
                return bench_generation(config.model, config.generate, device, rounds, done)
            check_memory(config, device, Layout())
            if config.train.precision == "auto":
                config = with_train(config, precision=choose_precision(device))
            progress.update(task, total=rounds + WARM_UP_STEPS)
            return bench_training(shorten(config), device, rounds, done)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise ConfigError(
                "out of memory; try half of --train.microbatch_seqs, --train.recompute=block, or a "
                "smaller model"
            ) from error


def expert_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The dtype experts compute in."""
    precision = config.train.precision
    return DTYPES[choose_precision(device) if precision == "auto" else precision]


def shorten(config: Config) -> Config:
    """The config with at most a few micro-batches to a step: each further one costs the same."""
    most = MAX_MICROBATCHES * config.train.microbatch_seqs * config.train.seq_len
    return with_train(config, batch_tokens=min(config.train.batch_tokens, most))


def with_train(config: Config, **changes: object) -> Config:
    """The config with other training settings."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))
