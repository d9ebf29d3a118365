"""Layer normalisation whose weights' gradients are summed in fp32.

In bf16 torch's CPU kernel adds them row by row in bf16, where a sum stops growing after a few
hundred terms: over 4,096 rows a bias's gradient is half of what it should be. Output and input
gradient are torch's own. Shapes: D d_model.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def layer_norm(
    x: Float[Tensor, "*N D"],
    weight: Float[Tensor, " D"],
    bias: Float[Tensor, " D"] | None,
    eps: float,
) -> Float[Tensor, "*N D"]:
    """Mean zero and variance one over the last dimension, then weight and bias (Ba et al. 2016)."""
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and torch.is_grad_enabled():
        return WideLayerNorm.apply(x, weight, bias, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


class WideLayerNorm(torch.autograd.Function):
    """LayerNorm in bf16 with its backward pass in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """The output; statistics are kept in fp32."""
        wide_bias = None if bias is None else bias.float()
        y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight.float(), wide_bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients in the dtypes of what they belong to."""
        x, weight, bias, mean, rstd = ctx.saved_tensors
        wide_bias = None if bias is None else bias.float()
        needed = [True, True, bias is not None]
        dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            grad.float(), x.float(), weight.shape, mean, rstd, weight.float(), wide_bias, needed
        )
        dbias = None if bias is None else dbias.to(bias.dtype)
        return dx.to(x.dtype), dweight.to(weight.dtype), dbias, None
