"""GELU's tanh form: exact in fp32, in bf16 as close as torch's own kernel."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lascaux.kernels.activation import gelu_tanh


def values_and_gradients(function: object, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)  # type: ignore[operator]
    return y.detach().double(), torch.autograd.grad(y.sum(), x)[0].double()


def test_fp32_is_the_tanh_form() -> None:
    x = torch.linspace(-6, 6, 1001)
    assert torch.equal(gelu_tanh(x), F.gelu(x, approximate="tanh"))


def test_bf16_is_as_close_to_the_tanh_form_as_torchs_kernel() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).mul(2).bfloat16()

    def torchs(x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")

    wanted = values_and_gradients(torchs, x.double())
    ours, theirs = values_and_gradients(gelu_tanh, x), values_and_gradients(torchs, x)
    for want, our, their in zip(wanted, ours, theirs, strict=True):
        assert (our - want).norm() < 1.1 * (their - want).norm()


def test_the_two_forms_of_gelu_differ_by_at_most_what_is_said() -> None:
    x = torch.linspace(-10, 10, 100_001, dtype=torch.float64)
    assert (F.gelu(x) - F.gelu(x, approximate="tanh")).abs().max() < 5e-4
