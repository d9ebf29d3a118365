"""LayerNorm and embedding in bf16: torch's results, and gradients that keep growing."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lascaux.kernels.embedding import embedding
from lascaux.kernels.norm import layer_norm

ROWS, WIDTH = 8192, 32


def normal(*shape: int, mean: float = 0.0) -> Tensor:
    draw = torch.Generator().manual_seed(len(shape))
    return (torch.randn(shape, generator=draw, dtype=torch.float64) + mean).bfloat16()


@pytest.mark.parametrize("with_bias", [True, False])
def test_layer_norm_sums_its_gradients_in_fp32(with_bias: bool) -> None:
    x, weight = normal(ROWS, WIDTH, mean=2.0), normal(WIDTH, mean=1.0)
    grad = normal(ROWS, WIDTH, mean=0.5).flip(0)
    inputs = [x, weight, normal(WIDTH)] if with_bias else [x, weight]

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        bias = leaves[2] if with_bias else None
        y = layer_norm(leaves[0], leaves[1], bias, 1e-5)
        return [y, *torch.autograd.grad(y, leaves, grad.to(dtype))]

    for got, want in zip(run(torch.bfloat16), run(torch.float64), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - want).norm() < 0.005 * want.norm()


def test_the_row_of_a_frequent_token_gets_its_whole_gradient() -> None:
    tokens = torch.zeros(ROWS, dtype=torch.long)
    tokens[::3] = 1
    weight, grad = normal(3, WIDTH).requires_grad_(), normal(ROWS, WIDTH, mean=0.5)
    rows = embedding(tokens, weight)
    assert torch.equal(rows, F.embedding(tokens, weight))
    (got,) = torch.autograd.grad(rows, weight, grad)
    wanted = torch.zeros(3, WIDTH, dtype=torch.float64).index_add_(0, tokens, grad.double())
    assert not got[2].any()
    assert (got.double() - wanted).norm() < 0.005 * wanted.norm()
