"""A matrix for each group of rows, and rows taken to their groups and back.

`F.grouped_mm` has no fp64, wants strides of whole 16 bytes, offsets in int32 that end with the last
row, and a gradient that is really in memory; where it cannot be used there is a loop.
In bf16 a CPU compiles a product anew for each number of rows it has not met, which takes longer
than the product: `pad_groups` leaves few numbers to meet.
Shapes: N rows, E groups, I and O their width before and after, P pairs of a row and a group, at
most K to a row, D width, M rows with those added to fill groups.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STRIDE_BYTES = 16
FEW_ROWS = 32
"""up to so many a matrix for each row is cheaper than sorting out which groups are empty"""
PADDED_ROWS = 16
CALL_MULTIPLICATIONS = 2_000_000
"""what a CPU does in bf16 in the time one product takes to begin"""
CACHED_ROWS = 1024
"""on a CPU: so many at a time stay in its cache between two operations"""


def grouped_linear(
    x: Float[Tensor, "N I"], weight: Float[Tensor, "E O I"], counts: Int[Tensor, " E"]
) -> Float[Tensor, "N O"]:
    """Each row times the matrix of its group; rows lie in order of groups, `counts` to each."""
    if len(x) <= FEW_ROWS and not torch.is_grad_enabled():
        groups = torch.repeat_interleave(counts, output_size=len(x))
        return torch.bmm(weight[groups], x[:, :, None])[:, :, 0]
    if pads_groups(x) and bool((counts * len(weight) == len(x)).all()):
        of_groups = x.view(len(weight), -1, x.shape[1])
        return torch.bmm(of_groups, weight.transpose(1, 2)).flatten(0, 1)
    fits = all(size * x.element_size() % STRIDE_BYTES == 0 for size in weight.shape[1:])
    if x.dtype in GROUPED_DTYPES and len(x) > 0 and fits:
        ends = counts.cumsum(0).to(torch.int32)
        return F.grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=ends)
    # unbind, as indexing makes a gradient of the size of all matrices for each of them
    parts = zip(x.split(counts.tolist()), weight.unbind(0), strict=True)
    return torch.cat([F.linear(rows, matrix) for rows, matrix in parts])


class Padding(NamedTuple):
    """Where rows stand among those added to fill their groups."""

    places: Int[Tensor, " N"]
    rows: Int[Tensor, " M"]
    """the row at each place, 0 where one was added"""
    added: Int[Tensor, " A"]
    counts: Int[Tensor, " E"]


def pads_groups(x: Float[Tensor, "N I"]) -> bool:
    """Whether these rows are worth it: in bf16 on a CPU, and more than a few."""
    many = len(x) > FEW_ROWS or (len(x) > 0 and torch.is_grad_enabled())
    return many and x.device.type == "cpu" and x.dtype == torch.bfloat16


def pad_groups(num_rows: int, counts: Int[Tensor, " E"], multiplications: int) -> Padding:
    """Groups of a multiple of 16 rows, or all as large as the largest, to be one product.

    The latter where its additional rows, of so many multiplications each, take less time than a
    product for each group takes to begin.
    """
    padded = (counts + PADDED_ROWS - 1) // PADDED_ROWS * PADDED_ROWS
    largest = int(padded.max())
    more = largest * len(counts) - int(padded.sum())
    if more * multiplications < CALL_MULTIPLICATIONS * len(counts):
        padded = torch.full_like(padded, largest)
    shift = padded.cumsum(0) - padded - counts.cumsum(0) + counts
    numbers = torch.arange(num_rows)
    places = numbers + torch.repeat_interleave(shift, counts, output_size=num_rows)
    rows = torch.full((int(padded.sum()),), -1).index_copy_(0, places, numbers)
    return Padding(places, rows.clamp(min=0), (rows < 0).nonzero().flatten(), padded)


def add_rows(x: Float[Tensor, "N D"], padding: Padding) -> Float[Tensor, "M D"]:
    """With rows of zeros at the ends of groups."""
    return _AddRows.apply(x, padding)


def leave_out_rows(x: Float[Tensor, "M D"], padding: Padding) -> Float[Tensor, "N D"]:
    """Without the rows that were added."""
    return _LeaveOutRows.apply(x, padding)


def _with_zeros(x: Tensor, padding: Padding) -> Tensor:
    return x.index_select(0, padding.rows).index_fill_(0, padding.added, 0)


class _AddRows(torch.autograd.Function):
    """Both directions are gathers: the gradient of indexing would be many single sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, padding: Padding) -> Tensor:
        ctx.padding = padding
        return _with_zeros(x, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.index_select(0, ctx.padding.places), None


class _LeaveOutRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, padding: Padding) -> Tensor:
        ctx.padding = padding
        return x.index_select(0, padding.places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _with_zeros(grad, ctx.padding), None


def take_rows(
    x: Float[Tensor, "N D"], pairs: Int[Tensor, " P"], per_row: int
) -> Float[Tensor, "P D"]:
    """The row of each pair; pair p belongs to row p // `per_row`, and each occurs once at most."""
    return _TakeRows.apply(x, pairs, per_row)


def sum_pairs(
    y: Float[Tensor, "P D"], pairs: Int[Tensor, " P"], weights: Float[Tensor, "N K"]
) -> Float[Tensor, "N D"]:
    """The weighted sum of each row's pairs, in fp32 at least; left out ones count 0."""
    return _SumPairs.apply(y, pairs, weights)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pairs: Tensor, per_row: int) -> Tensor:
        ctx.save_for_backward(pairs)
        ctx.shape = len(x), per_row
        return x.index_select(0, pairs // per_row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (pairs,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        ones = torch.ones(ctx.shape, dtype=wide, device=grad.device)
        return _sum_rows(grad, pairs, ones), None, None


class _SumPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, pairs: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(y, pairs, weights)
        return _sum_rows(y, pairs, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:  # type: ignore[override]
        y, pairs, weights = ctx.saved_tensors
        of_pairs = weights.flatten().index_select(0, pairs)
        grad_y, grad_of_pairs = torch.empty_like(y), torch.empty_like(of_pairs)
        for part in _parts(y):
            rows = grad.index_select(0, pairs[part] // weights.shape[1]).to(weights.dtype)
            grad_of_pairs[part] = (rows * y[part]).sum(1)
            grad_y[part] = rows.mul_(of_pairs[part, None])
        grad_weights = torch.zeros_like(weights).flatten().index_copy_(0, pairs, grad_of_pairs)
        return grad_y, None, grad_weights.view_as(weights)


def _sum_rows(y: Tensor, pairs: Tensor, weights: Tensor) -> Tensor:
    """Σ over the pairs of a row of weight · y, rounded once."""
    places = pairs.new_zeros(weights.numel())
    places[pairs] = torch.arange(len(pairs), device=pairs.device)
    places = places.view_as(weights)
    if len(pairs) < weights.numel():
        kept = weights.new_zeros(weights.numel()).index_fill_(0, pairs, 1)
        weights = weights * kept.view_as(weights)
    total = y.new_empty(len(weights), y.shape[1])
    for part in _parts(total):
        rows = y.index_select(0, places[part].flatten()).view(-1, weights.shape[1], y.shape[1])
        sums = rows[:, 0] * weights[part, :1]
        for j in range(1, weights.shape[1]):
            sums += rows[:, j] * weights[part, j : j + 1]
        total[part] = sums
    return total


def _parts(x: Tensor) -> Iterator[slice]:
    step = CACHED_ROWS if x.device.type == "cpu" else max(1, len(x))
    return (slice(start, start + step) for start in range(0, len(x), step))
