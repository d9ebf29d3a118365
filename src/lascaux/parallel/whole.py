"""Tensors of a split model put together on the first process, and sums over held-out text.

Whole tensors exist one at a time but on the first process, which keeps them in its CPU memory: a
checkpoint is written there, in the form that any layout reads.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lascaux.data.loader import NO_TARGET, Batch
from lascaux.parallel.pipeline import PipelineModel
from lascaux.parallel.plan import TIED_COPY
from lascaux.parallel.shards import whole
from lascaux.parallel.split import SplitModel
from lascaux.parallel.world import World


def collect_whole(named: Iterable[tuple[str, Tensor]], world: World) -> dict[str, Tensor]:
    """All tensors of the model on the first process; elsewhere none. Every process must call it."""
    kept: dict[str, Tensor] = {}
    holds = all(index == 0 for axis, index in world.place.items() if axis != "pp")
    for name, tensor in named:
        if not name.startswith(TIED_COPY):
            complete = whole(tensor.detach())
            if holds:
                kept[name] = complete.cpu()
    if world.layout.pp == 1:
        return kept if world.is_first else {}
    group = world.group("pp")
    for stage in range(1, world.layout.pp):
        if holds and group.rank() in (0, stage):
            kept |= _hand_over(kept, stage, group)
    return kept if world.is_first else {}


def _hand_over(own: dict[str, Tensor], stage: int, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Send one pipeline process's tensors to the first; returns what came."""
    if group.rank() == stage:
        described = [(name, tensor.shape, tensor.dtype) for name, tensor in own.items()]
        dist.send_object_list([described], group=group, group_dst=0)
        for tensor in own.values():
            dist.send(tensor.contiguous(), group=group, group_dst=0)
        return {}
    box: list[list[tuple[str, torch.Size, torch.dtype]]] = [[]]
    dist.recv_object_list(box, group=group, group_src=stage)
    came = {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in box[0]}
    for tensor in came.values():
        dist.recv(tensor, group=group, group_src=stage)
    return came


@torch.no_grad()
def sum_over_batches(
    network: SplitModel | PipelineModel, world: World, batches: Sequence[Batch], seqs: int
) -> float:
    """The sum of losses of all batches, nats, on every process; each data-parallel one has a share.

    What is missing to whole rounds of micro-batches of `seqs` is filled up without targets.
    """
    parts, at_once = world.layout.data_parallel, network.num_microbatches
    filled = [_fill_up(batch, seqs) for batch in batches]
    empty = replace(filled[0], targets=np.full_like(filled[0].targets, NO_TARGET))
    filled += [empty] * (-len(filled) % (parts * at_once))
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for round_ in _rounds(filled[world.data_rank :: parts], at_once):
        total += network.sum_losses(round_)
    return world.sum_over(total, ("pp", "dp_replicate", "fsdp")).item()


def _rounds(batches: Sequence[Batch], size: int) -> Iterator[Sequence[Batch]]:
    for start in range(0, len(batches), size):
        yield batches[start : start + size]


def _fill_up(batch: Batch, seqs: int) -> Batch:
    """`seqs` sequences, the last ones without targets."""
    rows = np.minimum(np.arange(seqs), len(batch.tokens) - 1)
    targets = batch.targets[rows].copy()
    targets[len(batch.tokens) :] = NO_TARGET
    ids, positions = batch.document_ids, batch.positions
    return Batch(
        batch.tokens[rows],
        targets,
        None if ids is None else ids[rows],
        None if positions is None else positions[rows],
    )
