"""`lascaux bench train`: the training step of a config on this machine, and where its time goes.

Random weights and random tokens without document boundaries: what they are does not change what a
step costs. The steps are those of `train`, batches come through the same background thread. Peaks
are measured again between the steps, since the speed of a shared machine drifts.
"""

import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from lascaux.bench.peaks import Peaks
from lascaux.config.schema import Config
from lascaux.data.loader import Batch, Prefetcher
from lascaux.model.accounting import count_parameters, flops_per_token
from lascaux.model.init import initialise
from lascaux.model.transformer import Transformer
from lascaux.optim.optimizer import build_optimizers
from lascaux.parallel.layout import Layout
from lascaux.parallel.world import World
from lascaux.train.precision import WorkingCopy
from lascaux.train.step import split_batch, train_step

WARM_UP_STEPS = 2
PARTS = ("forward", "backward", "optimizer", "copy", "data", "other")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSpeed:
    """Medians over the rounds; every fraction says of what."""

    parameters: int
    batch_tokens: int
    precision: str
    threads: int
    step_seconds: list[float]
    median_step_seconds: float
    tokens_per_second: float
    flops_per_token: int
    """6N + 12LdT (Chowdhery et al. 2022, appendix B)"""
    mfu: float
    """of the matrix-multiply peak in this precision, measured before each step; the median"""
    part_seconds: dict[str, float]
    """medians; copy is weights to the working precision and gradients back"""
    first_step_seconds: float
    peak_memory_bytes: int
    """resident memory of the process, or memory allocated on the GPU"""
    peaks: Peaks


@dataclass(slots=True)
class Laps:
    """Seconds by part of the step; on a GPU its own clock, by events."""

    device: torch.device
    marks: list[tuple[str, float | torch.cuda.Event]] = field(default_factory=list)

    def __call__(self, part: str) -> None:
        """The part with this name ends now."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((part, event))
        else:
            self.marks.append((part, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Sums by part since the first mark, which begins the step."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        sums: defaultdict[str, float] = defaultdict(float)
        for (_, before), (part, after) in zip(self.marks, self.marks[1:], strict=False):
            if isinstance(before, float) and isinstance(after, float):
                sums[part] += after - before
            elif isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event):
                sums[part] += before.elapsed_time(after) / 1000
        return sums


class RandomTokens:
    """Samples without a source: row i is drawn from (seed, i)."""

    def __init__(self, vocab_size: int, seq_len: int) -> None:
        self._vocab_size = vocab_size
        self._seq_len = seq_len

    def samples(self, start: int, count: int) -> Batch:
        """Rows start to start + count - 1."""
        draw = np.random.default_rng(start)
        cut = draw.integers(0, self._vocab_size, (count, self._seq_len + 1))
        return Batch(cut[:, :-1].copy(), cut[:, 1:].copy())


@dataclass(slots=True)
class Timings:
    """Step by step: seconds by part, and the peak measured just before."""

    parts: list[dict[str, float]] = field(default_factory=list)
    matmul_peaks: list[float] = field(default_factory=list)
    peaks: Peaks = field(default_factory=Peaks)


def time_steps(
    config: Config, device: torch.device, num_steps: int, done: Callable[[], None]
) -> Timings:
    """Take the steps; `done` is called after each."""
    train = config.train
    with device:
        model = Transformer(config.model)
    initialise(model, train.seed)
    working = WorkingCopy(model, train)
    optimizers = build_optimizers(model.named_parameters(), config.optimizer, train.precision)
    world = World(Layout(), 0, device)
    reader = RandomTokens(config.model.vocab_size, train.seq_len)
    prefetcher = Prefetcher(reader, 0, train.batch_tokens // train.seq_len)
    found = Timings()
    try:
        for _ in range(num_steps):
            found.matmul_peaks.append(found.peaks.measure_products(device)[train.precision])
            laps = Laps(device)
            laps("start")
            batch = prefetcher.next()
            laps("data")
            train_step(
                working,
                optimizers,
                split_batch(batch, train.microbatch_seqs),
                world=world,
                grad_clip=config.optimizer.grad_clip,
                lap=laps,
            )
            laps("other")
            found.parts.append(dict(laps.seconds()))
            done()
    finally:
        prefetcher.close()
    return found


def bench_training(
    config: Config, device: torch.device, rounds: int, done: Callable[[], None]
) -> TrainingSpeed:
    """Time `rounds` optimizer steps after two to warm up; `done` is called after each step."""
    train = config.train
    found = time_steps(config, device, WARM_UP_STEPS + rounds, done)
    peak_memory = peak_memory_bytes(device)
    found.peaks.measure_bandwidth(device)
    counted = found.parts[WARM_UP_STEPS:]
    steps = [sum(part.values()) for part in counted]
    median = statistics.median(steps)
    work = flops_per_token(config.model, train.seq_len)
    matmul_peaks = found.matmul_peaks[WARM_UP_STEPS:]
    return TrainingSpeed(
        parameters=count_parameters(config.model).total,
        batch_tokens=train.batch_tokens,
        precision=train.precision,
        threads=torch.get_num_threads(),
        step_seconds=steps,
        median_step_seconds=median,
        tokens_per_second=train.batch_tokens / median,
        flops_per_token=work,
        mfu=statistics.median(
            work * train.batch_tokens / step / peak
            for step, peak in zip(steps, matmul_peaks, strict=True)
        ),
        part_seconds={
            name: statistics.median(part.get(name, 0.0) for part in counted) for name in PARTS
        },
        first_step_seconds=sum(found.parts[0].values()),
        peak_memory_bytes=peak_memory,
        peaks=found.peaks,
    )


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use so far: of the process on a CPU, of tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
