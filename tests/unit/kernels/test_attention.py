"""Attention by blocks against sums written out, and against torch's kernel."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lascaux.kernels import attention as kernel
from lascaux.kernels.attention import BlockedAttention, attention

Inputs = tuple[Tensor, Tensor, Tensor]


def inputs(B: int, H: int, G: int, T: int, K: int, dtype: torch.dtype = torch.float64) -> Inputs:
    """q, k, v as the model has them: heads split off a projection, not contiguous."""
    draw = torch.Generator().manual_seed(T)
    q, k, v = (
        torch.randn(B, T, heads, K, generator=draw, dtype=torch.float64).to(dtype).transpose(1, 2)
        for heads in (H, G, G)
    )
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Each query on its own, over the keys it may see."""
    (B, H, T, K), group = q.shape, q.shape[1] // k.shape[1]
    rows = []
    for b in range(B):
        for h in range(H):
            for t in range(T):
                scores = k[b, h // group, : t + 1] @ q[b, h, t] / math.sqrt(K)
                if mask is not None:
                    row = mask[b % len(mask), h % mask.shape[1], t, : t + 1]
                    if row.dtype == torch.bool:
                        scores = scores.masked_fill(~row, float("-inf"))
                    else:
                        scores = scores + row
                rows.append(scores.softmax(0) @ v[b, h // group, : t + 1])
    return torch.stack(rows).view(B, H, T, K)


def masks(kind: str, B: int, H: int, T: int) -> Tensor | None:
    draw = torch.Generator().manual_seed(1)
    visible = torch.ones(T, T, dtype=torch.bool).tril()
    if kind == "documents":
        documents = torch.randint(0, 2, (B, T), generator=draw).cumsum(1)
        return visible & (documents[:, None, :, None] == documents[:, None, None, :])
    if kind == "penalty":
        penalty = torch.randn(1, H, T, T, generator=draw, dtype=torch.float64)
        return torch.where(visible, penalty, float("-inf"))
    return None


@settings(deadline=None, max_examples=40)
@given(
    B=st.integers(1, 3),
    G=st.integers(1, 2),
    group=st.integers(1, 3),
    T=st.integers(2, 20),
    K=st.sampled_from([1, 3, 8]),
    block=st.integers(1, 9),
    piece=st.sampled_from([1, 200, 10**6]),
    kind=st.sampled_from(["causal", "documents", "penalty"]),
)
def test_outputs_and_gradients_are_those_of_the_sums(
    B: int, G: int, group: int, T: int, K: int, block: int, piece: int, kind: str
) -> None:
    H = G * group
    arguments, mask = inputs(B, H, G, T, K), masks(kind, B, H, T)
    grad = torch.randn(B, H, T, K, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "BLOCK_QUERIES", block)
        patch.setattr(kernel, "PIECE_ELEMENTS", piece)
        got = attention(*arguments, mask)
        got_gradients = torch.autograd.grad(got, arguments, grad)
    wanted = written_out(*arguments, mask)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)
    for a, b in zip(got_gradients, torch.autograd.grad(wanted, arguments, grad), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_bf16_rounds_about_as_much_as_torchs_kernel_does() -> None:
    exact = inputs(2, 4, 4, 256, 64)
    rounded = inputs(2, 4, 4, 256, 64, torch.bfloat16)
    grad = torch.randn(2, 4, 256, 64, dtype=torch.float64)

    def run(function: object, arguments: Inputs) -> list[Tensor]:
        out = function(*arguments)  # type: ignore[operator]
        return [out, *torch.autograd.grad(out, arguments, grad.to(out.dtype))]

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    wanted = run(torchs, exact)
    ours = run(lambda q, k, v: BlockedAttention.apply(q, k, v, None), rounded)
    theirs = run(torchs, rounded)
    for want, our, their in zip(wanted, ours, theirs, strict=True):
        assert (our.double() - want).norm() < 2 * (their.double() - want).norm()
        assert (our.double() - want).norm() < 0.01 * want.norm()


def test_a_cache_or_a_long_sequence_goes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> Tensor:
        raise AssertionError("not to be used here")

    q, k, v = inputs(1, 2, 2, 12, 4)
    whole = attention(q, k, v, None)
    monkeypatch.setattr(BlockedAttention, "apply", refuse)
    visible = torch.ones(12, 12, dtype=torch.bool).tril()[None, None, 8:]
    later = attention(q[:, :, 8:], k, v, visible)
    torch.testing.assert_close(later, whole[:, :, 8:], atol=1e-12, rtol=0)
    monkeypatch.setattr(kernel, "LONGEST_BLOCKED", 11)
    torch.testing.assert_close(attention(q, k, v, None), whole, atol=1e-12, rtol=0)
