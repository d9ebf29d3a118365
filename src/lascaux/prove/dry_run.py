"""Builds a model of full size for one of many processes, without their number, memory or network.

The real code runs on tensors without data in a process group without peers: that it builds, what
this process holds and what it says to the others are those of the real run. Processes of a layout
differ in their pipeline stage alone, so the first, a middle and the last one stand for all.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining.stage import InferenceMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.weak import WeakIdKeyDictionary

from lascaux.config.schema import Config
from lascaux.data.loader import Batch
from lascaux.kernels import attention
from lascaux.model.transformer import Transformer
from lascaux.optim.optimizer import build_optimizers, state_tensors
from lascaux.parallel import experts
from lascaux.parallel.layout import Layout
from lascaux.parallel.network import split_network
from lascaux.parallel.pipeline import PipelineModel
from lascaux.parallel.shards import local
from lascaux.parallel.split import SplitModel
from lascaux.parallel.world import World
from lascaux.prove.forks import in_fresh_processes
from lascaux.prove.traffic import Amount, Table, Traffic
from lascaux.train.precision import DTYPES

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """What one process holds, and says in a step."""

    rank: int
    stages: tuple[int, ...]
    """of the pipeline; (0,) without one"""
    parameters: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    kept_bytes: int
    """the most that forward passes keep for their backward passes at one time, weights aside"""
    traffic: Table

    @property
    def total_bytes(self) -> int:
        """All of it; gathered weights and what lives inside one layer come on top."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.kept_bytes


def dry_run(config: Config, layout: Layout) -> list[Held]:
    """What processes of a layout hold and say: of the first, a middle and the last pipeline stage.

    A step's traffic is linear in its micro-batches; it is counted for one and for two rounds of
    them and then carried on to those of a step. Sums of single numbers are left out. Experts are
    taken to be equally busy, and none drops a token.
    """
    whole = config.train.batch_tokens // (config.train.microbatch_seqs * config.train.seq_len)
    rounds = whole // layout.data_parallel / layout.pp
    ranks = [i * layout.world_size // layout.pp for i in {0, layout.pp // 2, layout.pp - 1}]
    runs = [(config, layout, rank, n * layout.pp) for rank in sorted(ranks) for n in (1, 2)]
    results = in_fresh_processes(_run, runs)
    return [
        dataclasses.replace(two, traffic=_carry_on(one.traffic, two.traffic, rounds))
        for one, two in zip(results[::2], results[1::2], strict=True)
    ]


def _carry_on(one: Table, two: Table, rounds: float) -> Table:
    def carried(a: int, b: int) -> int:
        return round(a + (b - a) * (rounds - 1))

    pairs = {key: (one.get(key, Amount()), amount) for key, amount in two.items()}
    return {
        key: Amount(carried(a.times, b.times), carried(a.num_bytes, b.num_bytes))
        for key, (a, b) in pairs.items()
    }


def _run(config: Config, layout: Layout, rank: int, microbatches: int) -> Held:
    """One step of this many micro-batches on one process.

    In a process of its own: torch remembers groups of processes by the meshes they were made for.
    """
    if config.train.device != "cpu":
        attention.LONGEST_BLOCKED = 0  # as on a GPU, where attention keeps no probabilities
    experts.row_counts = _even_rows
    train = config.train
    model = dataclasses.replace(config.model, capacity_factor=None, drop_by="position")
    config = dataclasses.replace(config, model=model)
    tokens = microbatches * train.microbatch_seqs * train.seq_len * layout.data_parallel
    config = dataclasses.replace(config, train=dataclasses.replace(train, batch_tokens=tokens))
    dist.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
    world = World(layout, rank, CPU)
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def make_empty(model: Transformer, device: torch.device, seed: int) -> None:
        with mode:
            model.to_empty(device=device)

    network = split_network(config, world, DTYPES[train.precision], make_empty)
    with mode:
        return _step(config, world, network, microbatches)


def _even_rows(by_process: Tensor, rows: int) -> list[int]:
    """As many rows from each process as from any other: what routers choose is not known here."""
    return [rows // len(by_process)] * len(by_process)


def _step(
    config: Config, world: World, network: SplitModel | PipelineModel, microbatches: int
) -> Held:
    named = list(network.named_parameters())
    parameters = [parameter for _, parameter in named]
    shape = (config.train.microbatch_seqs, config.train.seq_len)
    batches = [Batch(np.zeros(shape, np.int64), np.zeros(shape, np.int64))] * microbatches
    if isinstance(network, PipelineModel):
        _answer_vote(network)
        stages = network.models
    else:
        stages = {0: network.model}
    with Traffic(world) as traffic, _kept_for_backward(list(stages.values())) as kept:
        network.forward_backward(batches, 1, lambda _: None)
        network.gradient_norm()
        optimizers = build_optimizers(named, config.optimizer, config.train.precision)
        for optimizer in optimizers:
            optimizer.step()
    return Held(
        rank=world.rank,
        stages=tuple(stages),
        parameters=sum(local(p).numel() for p in parameters),
        weights_bytes=_bytes(parameters),
        gradients_bytes=_bytes(p.grad for p in parameters),
        optimizer_bytes=_bytes(state_tensors(named, optimizers).values()),
        kept_bytes=kept(),
        traffic=traffic.table(),
    )


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(local(t).numel() * t.dtype.itemsize for t in tensors if t is not None)


def _answer_vote(network: PipelineModel) -> None:
    """Stages otherwise ask each other whether the shapes are known, by sending numbers."""

    def settle(stages: list[Any], has_backward: bool, p2p_done: bool) -> None:
        for stage in stages:
            stage._inference_mode = InferenceMode.STATIC

    network.schedule._warmup_p2p = settle


@contextmanager
def _kept_for_backward(models: list[Transformer]) -> Iterator[Callable[[], int]]:
    """The most bytes that autograd has kept at the end of any forward pass.

    Counted then, since FSDP has let go of gathered weights that autograd also refers to.
    """
    alive: WeakIdKeyDictionary = WeakIdKeyDictionary()
    own = {id(local(p).untyped_storage()) for model in models for p in model.parameters()}
    most = 0

    def pack(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        alive[kept] = None
        return kept

    def count(*_: Any) -> None:
        nonlocal most
        storages = {s._cdata: s for s in (k.tensor.untyped_storage() for k in alive)}
        most = max(most, sum(s.nbytes() for key, s in storages.items() if key not in own))

    for model in models:
        model.register_forward_hook(count)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        yield lambda: most


class _Kept:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
