"""Loss without logits against torch's cross-entropy over all of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lascaux.kernels import cross_entropy as kernel
from lascaux.kernels.cross_entropy import linear_cross_entropy


def inputs(N: int, D: int, V: int, bias: bool) -> tuple[list[Tensor], Tensor]:
    draw = torch.Generator().manual_seed(N)
    shapes = [(N, D), (V, D)] + [(V,)] * bias
    parameters = [torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes]
    targets = torch.randint(0, V, (N,), generator=draw)
    targets[torch.rand(N, generator=draw) < 0.3] = -100
    return [p.requires_grad_() for p in parameters], targets


def with_bias(parameters: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    h, weight, *bias = parameters
    return h, weight, bias[0] if bias else None


def torchs(parameters: list[Tensor], targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(*with_bias(parameters)), targets, reduction="sum")


@settings(deadline=None, max_examples=40)
@given(
    N=st.integers(1, 30),
    V=st.integers(1, 12),
    bias=st.booleans(),
    chunk=st.sampled_from([1, 40, 10**6]),
    part=st.sampled_from([1, 30, 10**6]),
)
def test_loss_and_gradients_do_not_depend_on_the_cut(
    N: int, V: int, bias: bool, chunk: int, part: int
) -> None:
    parameters, targets = inputs(N, 5, V, bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "CHUNK_LOGITS", chunk)
        patch.setattr(kernel, "SLICE_LOGITS", part)
        got = linear_cross_entropy(*with_bias(parameters), targets)
        got_gradients = torch.autograd.grad(got / 7, parameters)
        with torch.no_grad():
            assert linear_cross_entropy(*with_bias(parameters), targets) == got
    wanted = torchs(parameters, targets)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)
    for a, b in zip(got_gradients, torch.autograd.grad(wanted / 7, parameters), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_a_batch_without_targets_costs_nothing_and_moves_nothing() -> None:
    parameters, targets = inputs(6, 5, 9, bias=True)
    loss = linear_cross_entropy(*with_bias(parameters), torch.full_like(targets, -100))
    assert loss.item() == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, parameters))


@pytest.mark.parametrize("chunk", [2**27, 64 * 300])
def test_bf16_sums_losses_and_weight_gradients_in_fp32(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(kernel, "CHUNK_LOGITS", chunk)
    exact, targets = inputs(2048, 32, 300, bias=False)
    rounded = [p.detach().bfloat16().requires_grad_() for p in exact]
    exact = [p.detach().double().requires_grad_() for p in rounded]
    loss = linear_cross_entropy(*with_bias(rounded), targets)
    wanted = torchs(exact, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    gradients = torch.autograd.grad(loss, rounded)
    for got, want in zip(gradients, torch.autograd.grad(wanted, exact), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - want).norm() < 0.01 * want.norm()  # rounded logits
