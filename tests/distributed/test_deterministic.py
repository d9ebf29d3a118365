"""Deterministic mode: the same bits of every weight for any number of data-parallel processes."""

import dataclasses
import hashlib
from typing import Any

import pytest
import torch

from lascaux.config.schema import ParallelConfig
from lascaux.model.init import initialise
from lascaux.model.transformer import Transformer
from lascaux.optim.optimizer import build_optimizers
from lascaux.parallel.layout import resolve_layout
from lascaux.parallel.network import split_network
from lascaux.parallel.shards import whole
from lascaux.parallel.world import World
from lascaux.train.precision import DTYPES, WorkingCopy
from lascaux.train.step import Network, split_batch, train_step
from tests.distributed.ranks import on_ranks
from tests.distributed.test_layouts import CPU, make_batch, make_config

STEPS = 20


def hash_after_training(rank: int, parallel: dict[str, Any], size: int, precision: str) -> str:
    config = make_config("parallel")
    train = dataclasses.replace(
        config.train, deterministic=True, microbatch_seqs=1, precision=precision
    )
    config = dataclasses.replace(config, train=train, parallel=ParallelConfig(**parallel))
    world = World(resolve_layout(config, size), rank, CPU)
    network: Network
    if size == 1:
        model = Transformer(config.model)
        initialise(model, train.seed)
        network = WorkingCopy(model, train)
    else:
        network = split_network(config, world, DTYPES[precision])
    optimizers = build_optimizers(network.named_parameters(), config.optimizer, deterministic=True)
    for step in range(STEPS):
        batches = split_batch(make_batch(step, False), 1)
        share = batches[world.data_rank :: world.layout.data_parallel]
        train_step(network, optimizers, share, world=world, grad_clip=0.5)
    digest = hashlib.sha256()
    for _, parameter in network.named_parameters():
        digest.update(whole(parameter.detach()).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_are_the_same_to_the_last_bit(precision: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    wanted = hash_after_training(0, {}, 1, precision)
    torch.set_num_threads(threads)
    for layout in (
        dict(dp_replicate=2),
        dict(dp_replicate=4),
        dict(dp_shard=2),
        dict(dp_shard=4),
        dict(dp_replicate=2, dp_shard=2),
    ):
        size = layout.get("dp_replicate", 1) * layout.get("dp_shard", 1)
        found = on_ranks(size, hash_after_training, layout, size, precision)
        assert set(found) == {wanted}, layout
