"""How often a block talks under tensor parallelism; a split model is put together right."""

from typing import Any

import pytest
import torch

import lascaux.parallel.collectives as collectives
from lascaux.parallel.layout import resolve_layout
from lascaux.parallel.network import split_network
from lascaux.parallel.plan import TIED_COPY
from lascaux.parallel.shards import fill
from lascaux.parallel.split import SplitModel
from lascaux.parallel.whole import collect_whole
from lascaux.parallel.world import World
from lascaux.train.step import split_batch
from tests.distributed.ranks import on_ranks
from tests.distributed.test_layouts import CPU, make_batch, make_config


def count(rank: int, model: str) -> dict[str, int]:
    """Collectives along the sequence in one micro-batch's forward and backward pass."""
    config = make_config(model, tp=2)
    world = World(resolve_layout(config, 2), rank, CPU)
    network = split_network(config, world, torch.float32)
    assert isinstance(network, SplitModel)
    counts = {"all_gather": 0, "_reduce_scatter": 0}
    for name in counts:
        original = getattr(collectives, name)

        def counted(*arguments: Any, name: str = name, original: Any = original) -> Any:
            counts[name] += 1
            return original(*arguments)

        setattr(collectives, name, counted)
    network.forward_backward(split_batch(make_batch(0, False), 2)[:1], 1, lambda _: None)
    return counts


def test_a_parallel_block_reduces_once() -> None:
    """Four layers; a gather and a scatter make an all-reduce, once forwards and once backwards."""
    (sequential, _), (parallel, _) = (on_ranks(2, count, m) for m in ("sequential", "parallel"))
    outside = 2  # embedding and head: a pair forwards, a pair backwards
    assert sequential == {"all_gather": 4 * 4 + outside, "_reduce_scatter": 4 * 4 + outside}
    assert parallel == {"all_gather": 2 * 4 + outside, "_reduce_scatter": 2 * 4 + outside}


def there_and_back(rank: int, parallel: dict[str, Any], size: int) -> bool:
    config = make_config("tied", **parallel)
    world = World(resolve_layout(config, size), rank, CPU)
    network = split_network(config, world, torch.float32)

    def make(name: str, shape: torch.Size) -> torch.Tensor:
        seed = sum(map(ord, "embed.weight" if name == TIED_COPY else name))
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    fill(network.named_parameters(), make)
    found = collect_whole(network.named_parameters(), world)
    if rank > 0:
        return not found
    return len(found) > 30 and all(torch.equal(t, make(n, t.shape)) for n, t in found.items())


@pytest.mark.parametrize(
    "parallel",
    [dict(dp_shard=4), dict(dp_replicate=2, tp=2), dict(dp_shard=2, tp=2), dict(pp=2, tp=2)],
    ids=str,
)
def test_weights_go_to_any_layout_and_come_back(parallel: dict[str, Any]) -> None:
    assert all(on_ranks(4, there_and_back, parallel, 4))
