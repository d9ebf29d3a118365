"""Rows that travel to experts on other processes come back as they went, forwards and backwards."""

from typing import Any

import pytest
import torch

from lascaux.parallel.experts import Exchange
from lascaux.parallel.layout import Layout
from lascaux.parallel.world import World
from tests.distributed.ranks import on_ranks

CPU = torch.device("cpu")
WIDTH = 3


def there_and_back(rank: int, size: int, ep: int, kind: str) -> bool:
    world = World(Layout(dp_shard=size, ep=ep), rank, CPU)
    exchange = Exchange(world.group("ep"))
    draw = torch.Generator().manual_seed(rank)
    counts = torch.randint(0, 4, (8,), generator=draw)
    if kind == "nothing for the last":
        counts[-8 // ep :] = 0
    if kind == "nothing from the first" and rank == 0:
        counts.zero_()
    x = torch.randn(int(counts.sum()), WIDTH, generator=draw, dtype=torch.float64)
    x.requires_grad_()
    seen: list[Any] = []

    def identity(rows: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
        assert len(rows) == local.sum() and len(local) == 8 // ep
        seen.append(rows)
        return rows * 1.0

    y = exchange(x, counts, identity)
    grad = torch.randn(y.shape, generator=draw, dtype=torch.float64)
    (found,) = torch.autograd.grad(y, x, grad)
    if kind == "nothing for the last" and rank % ep == ep - 1:
        assert len(seen[0]) == 0
    return torch.equal(y, x) and torch.equal(found, grad)


def by_expert(rank: int, size: int) -> bool:
    """Expert e multiplies by e + 1: every row has met its own, and gradients of weights add up."""
    world = World(Layout(dp_shard=size, ep=size), rank, CPU)
    counts = torch.arange(8) % 3 + rank
    factors = (torch.arange(8.0).view(size, -1)[rank] + 1).requires_grad_()
    x = torch.ones(int(counts.sum()), WIDTH)

    def multiply(rows: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
        return rows * factors.repeat_interleave(local)[:, None]

    y = Exchange(world.group("ep"))(x, counts, multiply)
    assert torch.equal(y[:, 0], (torch.arange(8) + 1).repeat_interleave(counts).float())
    y.sum().backward()
    everybody = sum(torch.arange(8) % 3 + r for r in range(size))
    assert factors.grad is not None
    return torch.equal(factors.grad, WIDTH * everybody.view(size, -1)[rank].float())


@pytest.mark.parametrize(("size", "ep"), [(2, 2), (4, 2), (4, 4)])
def test_identity_experts_are_the_identity(size: int, ep: int) -> None:
    for kind in ("uneven", "nothing for the last", "nothing from the first"):
        assert all(on_ranks(size, there_and_back, size, ep, kind)), kind


def test_every_row_meets_its_expert() -> None:
    assert all(on_ranks(2, by_expert, 2)) and all(on_ranks(4, by_expert, 4))
