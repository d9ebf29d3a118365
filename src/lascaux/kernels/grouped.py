"""A matrix for each group of rows, and rows taken to their groups and back.

`F.grouped_mm` has no fp64, wants strides of whole 16 bytes, offsets in int32 that end with the last
row, and a gradient that is really in memory; where it cannot be used there is a loop.
Shapes: N rows, E groups, I and O their width before and after, P pairs of a row and a group, at
most K to a row, D width.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STRIDE_BYTES = 16
FEW_ROWS = 32
"""up to so many a matrix for each row is cheaper than sorting out which groups are empty"""


def grouped_linear(
    x: Float[Tensor, "N I"], weight: Float[Tensor, "E O I"], counts: Int[Tensor, " E"]
) -> Float[Tensor, "N O"]:
    """Each row times the matrix of its group; rows lie in order of groups, `counts` to each."""
    if len(x) <= FEW_ROWS and not torch.is_grad_enabled():
        groups = torch.repeat_interleave(counts, output_size=len(x))
        return torch.bmm(weight[groups], x[:, :, None])[:, :, 0]
    fits = all(size * x.element_size() % STRIDE_BYTES == 0 for size in weight.shape[1:])
    if x.dtype in GROUPED_DTYPES and len(x) > 0 and fits:
        ends = counts.cumsum(0).to(torch.int32)
        return F.grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=ends)
    # unbind, as indexing makes a gradient of the size of all matrices for each of them
    parts = zip(x.split(counts.tolist()), weight.unbind(0), strict=True)
    return torch.cat([F.linear(rows, matrix) for rows, matrix in parts])


def take_rows(
    x: Float[Tensor, "N D"], pairs: Int[Tensor, " P"], per_row: int
) -> Float[Tensor, "P D"]:
    """The row of each pair; pair p belongs to row p // `per_row`, and each occurs once at most."""
    return _TakeRows.apply(x, pairs, per_row)


def sum_pairs(
    y: Float[Tensor, "P D"], pairs: Int[Tensor, " P"], weights: Float[Tensor, "N K"]
) -> Float[Tensor, "N D"]:
    """The weighted sum of each row's pairs, in the dtype of the weights; left out ones count 0."""
    num_rows, per_row = weights.shape
    placed = y.new_zeros(num_rows * per_row, y.shape[1]).index_copy(0, pairs, y)
    return (placed.view(num_rows, per_row, y.shape[1]) * weights[..., None]).sum(1)


class _TakeRows(torch.autograd.Function):
    """Its gradient is a gather and a sum, in one order; that of indexing is many single sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pairs: Tensor, per_row: int) -> Tensor:
        ctx.save_for_backward(pairs)
        ctx.num_rows, ctx.per_row = len(x), per_row
        return x.index_select(0, pairs // per_row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (pairs,) = ctx.saved_tensors
        placed = grad.new_zeros(ctx.num_rows * ctx.per_row, grad.shape[1])
        placed.index_copy_(0, pairs, grad)
        return placed.view(ctx.num_rows, ctx.per_row, grad.shape[1]).sum(1), None, None
