"""Rows of a table, with the gradient of a row summed in fp32 however often it is used.

In bf16 torch's CPU kernel adds in bf16, where the sum of a frequent token stops growing after a few
hundred terms. Shapes: N tokens, V rows, D d_model.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def embedding(tokens: Int[Tensor, "*N"], weight: Float[Tensor, "V D"]) -> Float[Tensor, "*N D"]:
    """The row of each token id."""
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.is_grad_enabled():
        return WideEmbedding.apply(tokens, weight)
    return F.embedding(tokens, weight)


class WideEmbedding(torch.autograd.Function):
    """A look-up in bf16 whose gradient is made in fp32."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        """The rows."""
        ctx.save_for_backward(tokens)
        ctx.num_rows, ctx.dtype = len(weight), weight.dtype
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        """The whole table's gradient."""
        (tokens,) = ctx.saved_tensors
        wide = torch.ops.aten.embedding_dense_backward(
            grad.float(), tokens, ctx.num_rows, -1, False
        )
        return None, wide.to(ctx.dtype)
