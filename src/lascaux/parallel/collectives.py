"""Collectives along one dimension of a tensor that autograd can follow.

Each is the other's gradient. `Group` counts the processes of one axis; sums are in the dtype of
the tensor.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """The pieces of all processes beside each other; the gradients of all of them are added up."""
    return _Gather.apply(x, dim, group)


def scatter_sum(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """This process's piece of the sum over all processes."""
    return _ScatterSum.apply(x, dim, group)


def own_piece(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """This process's piece of a tensor that all have whole."""
    return x.chunk(group.size(), dim)[group.rank()]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _reduce_scatter(grad, ctx.dim, ctx.group), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return all_gather(grad, ctx.dim, ctx.group), None, None


def all_gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """The pieces of all processes beside each other; no gradient."""
    pieces = x.new_empty((group.size(), *x.shape))
    dist.all_gather_single(pieces.flatten(0, 1), x.contiguous(), group=group)
    return pieces.movedim(0, dim).flatten(dim, dim + 1)


def _reduce_scatter(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    pieces = x.unflatten(dim, (group.size(), -1)).movedim(dim, 0).contiguous()
    piece = x.new_empty(pieces.shape[1:])
    dist.reduce_scatter_single(piece, pieces.flatten(0, 1), group=group)
    return piece
