"""Trains a small copy on a layout and on one process, and compares everything.

In fp64, so that what differs is no rounding: a wrong scale, a gradient added twice, a mask one
off show as they are. SGD comes first, since Adam would hide a gradient of the wrong scale; then
the optimizer of the configuration, and, where it trains in bf16, that too with bounds of its own.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch.optim import SGD, Optimizer

from lascaux.config.schema import Config
from lascaux.data.loader import NO_TARGET, Batch
from lascaux.model.init import initialise
from lascaux.model.transformer import Transformer
from lascaux.optim.optimizer import build_optimizers
from lascaux.parallel.layout import Layout
from lascaux.parallel.network import split_network
from lascaux.parallel.plan import TIED_COPY
from lascaux.parallel.shards import Slab, local, slab_of
from lascaux.parallel.world import World
from lascaux.prove.traffic import Table, Traffic
from lascaux.train.precision import WorkingCopy
from lascaux.train.step import Network, split_batch, train_step

STEPS = 3


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """One way of training, and how far two of them may differ."""

    optimizer: str
    precision: str
    bound: float
    """of losses and norms relative to themselves, of weights relative to the largest movement"""

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation; weights are in it too, or in fp32 beside bf16."""
        return torch.float64 if self.precision == "fp64" else torch.bfloat16


@dataclasses.dataclass(frozen=True, slots=True)
class Trained:
    """What one process has at the end of a trial."""

    losses: list[float]
    grad_norms: list[float]
    weights: list[tuple[str, Slab, np.ndarray]]
    """name, place in the whole tensor, values"""
    traffic: Table
    """of the second step"""


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """The largest differences between a layout and one process, as `Trial.bound` measures them."""

    trial: Trial
    losses: float
    grad_norms: float
    weights: float
    worst_weight: str
    process: int
    """which process has it"""

    @property
    def agrees(self) -> bool:
        """Whether all are within the bound; what is no number is not."""
        return all(d <= self.trial.bound for d in (self.losses, self.grad_norms, self.weights))


def trials(config: Config) -> list[Trial]:
    """Those for a configuration."""
    found = [Trial("sgd", "fp64", 1e-7), Trial(config.optimizer.name, "fp64", 1e-7)]
    if config.train.precision == "bf16":
        found.append(Trial("sgd", "bf16", 5e-2))
    return found


def train_on_layout(
    rank: int, config: Config, layout: Layout, device: torch.device
) -> list[Trained]:
    """This process's part of every trial of a small configuration."""
    world, found = World(layout, rank, device), []
    for trial in trials(config):
        with _weights_in(trial):
            found.append(_train(split_network(config, world, trial.dtype), config, world, trial))
    return found


def train_on_one(config: Config, device: torch.device) -> list[Trained]:
    """Every trial on one process."""
    world, found = World(Layout(), 0, device), []
    for trial in trials(config):
        precision = "bf16" if trial.precision == "bf16" else "fp32"
        train = dataclasses.replace(config.train, precision=precision)
        with _weights_in(trial), device:
            model = Transformer(config.model)
            initialise(model, train.seed)
            found.append(_train(WorkingCopy(model, train), config, world, trial))
    return found


@contextmanager
def _weights_in(trial: Trial) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if trial.precision == "fp64" else torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _train(network: Network, config: Config, world: World, trial: Trial) -> Trained:
    optimizers = _optimizers(network, config, trial)
    losses, norms, traffic = [], [], Traffic(world)
    for step in range(STEPS):
        batches = split_batch(make_batch(config, step), config.train.microbatch_seqs)
        own = batches[world.data_rank :: world.layout.data_parallel]
        clip = config.optimizer.grad_clip
        step_once = partial(
            train_step, network, optimizers, own, world=world, grad_clip=clip, step=step
        )
        if step == 1:  # stages of a pipeline get to know each other in the first
            with traffic:
                result = step_once()
        else:
            result = step_once()
        losses.append(result.loss)
        norms.append(result.grad_norm)
    weights = [
        (name, slab_of(p), local(p.detach()).cpu().numpy())
        for name, p in network.named_parameters()
    ]
    return Trained(losses, norms, weights, traffic.table())


def _optimizers(network: Network, config: Config, trial: Trial) -> Sequence[Optimizer]:
    if trial.optimizer == "sgd":
        parameters = [parameter for _, parameter in network.named_parameters()]
        return [SGD(parameters, lr=0.1, momentum=0.9)]
    return build_optimizers(network.named_parameters(), config.optimizer, "fp32")


def make_batch(config: Config, step: int) -> Batch:
    """Random tokens; every second sequence lacks half of its targets: no mean of means fits."""
    train = config.train
    seqs, length = train.batch_tokens // train.seq_len, train.seq_len
    draw = np.random.default_rng((train.seed, step))
    tokens = draw.integers(0, config.model.vocab_size, (seqs, length + 1))
    targets = tokens[:, 1:].copy()
    targets[::2][draw.random(targets[::2].shape) < 0.5] = NO_TARGET
    if config.data.document_boundaries == "ignore":
        return Batch(tokens[:, :-1].copy(), targets)
    begins = draw.random((seqs, length)) < 0.2
    column = np.arange(length)
    first = np.maximum.accumulate(np.where(begins, column, 0), axis=1)
    ids = np.cumsum(begins, axis=1, dtype=np.int64)
    return Batch(tokens[:, :-1].copy(), targets, ids, column - first)


def compare(
    config: Config, on_layout: Sequence[Sequence[Trained]], one: Sequence[Trained]
) -> list[Comparison]:
    """Every trial of every process of a layout against that of one process."""
    found = []
    for number, (trial, alone) in enumerate(zip(trials(config), one, strict=True)):
        ranks = [results[number] for results in on_layout]
        found.append(_compare(config, trial, ranks, alone))
    return found


def _compare(config: Config, trial: Trial, ranks: Sequence[Trained], one: Trained) -> Comparison:
    wanted = {name: weight for name, _, weight in one.weights}
    covered = {name: np.zeros(w.shape, dtype=bool) for name, w in wanted.items()}
    movement = _largest_movement(config, wanted)
    worst, worst_weight, process = 0.0, "", 0
    for rank, trained in enumerate(ranks):
        for copied, slab, weight in trained.weights:
            name = "embed.weight" if copied == TIED_COPY else copied
            covered[name][slab] = True
            difference = _largest(weight - wanted[name][slab]) / movement
            if difference > worst:
                worst, worst_weight, process = difference, copied, rank
    for name, elements in covered.items():
        assert elements.all(), f"{name}: {(~elements).sum()} elements are on no process"
    return Comparison(
        trial,
        max(_relative(trained.losses, one.losses) for trained in ranks),
        max(_relative(trained.grad_norms, one.grad_norms) for trained in ranks),
        worst,
        worst_weight,
        process,
    )


def _largest(difference: np.ndarray) -> float:
    """The largest absolute value; infinite if there is one that is no number."""
    largest = float(np.abs(difference).max(initial=0.0))
    return math.inf if math.isnan(largest) else largest


def _largest_movement(config: Config, weights: dict[str, np.ndarray]) -> float:
    model = Transformer(config.model)
    initialise(model, config.train.seed)
    started = ((name, p.detach().numpy()) for name, p in model.named_parameters())
    return max(_largest(weights[name] - values) for name, values in started)


def _relative(found: Sequence[float], wanted: Sequence[float]) -> float:
    pairs = zip(found, wanted, strict=True)
    return max(abs(a - b) / abs(b) if math.isfinite(a) else math.inf for a, b in pairs)
