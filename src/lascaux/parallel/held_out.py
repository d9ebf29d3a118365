"""Sums over held-out text, of a model that is split over processes."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from lascaux.data.loader import NO_TARGET, Batch
from lascaux.parallel.pipeline import PipelineModel
from lascaux.parallel.split import SplitModel
from lascaux.parallel.world import World


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
