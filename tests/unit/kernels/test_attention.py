"""Attention by blocks against sums written out, and against torch's kernel."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lascaux.kernels import attention as kernel
from lascaux.kernels.attention import attention, blocked_attention

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
    """Each query on its own, over the keys it may see; the last one stands at the last key."""
    (B, H, T, K), group, past = q.shape, q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    rows = []
    for b in range(B):
        for h in range(H):
            for t in range(T):
                scores = k[b, h // group, : past + t + 1] @ q[b, h, t] / math.sqrt(K)
                if mask is not None:
                    row = mask[b % len(mask), h % mask.shape[1], t, : past + t + 1]
                    if row.dtype == torch.bool:
                        scores = scores.masked_fill(~row, float("-inf"))
                    else:
                        scores = scores + row
                rows.append(scores.softmax(0) @ v[b, h // group, : past + t + 1])
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
    past=st.sampled_from([0, 0, 1, 5, 11]),
    longest=st.sampled_from([2048, 2048, 0]),
)
def test_outputs_and_gradients_are_those_of_the_sums(
    B: int,
    G: int,
    group: int,
    T: int,
    K: int,
    block: int,
    piece: int,
    kind: str,
    past: int,
    longest: int,
) -> None:
    """Queries of a whole sequence or its end, by blocks and by torch."""
    H = G * group
    q, k, v = inputs(B, H, G, past + T, K)
    arguments = (q[:, :, past:].detach().requires_grad_(), k, v)
    mask = masks(kind, B, H, past + T)
    mask = None if mask is None else mask[:, :, past:]
    grad = torch.randn(B, H, T, K, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "LONGEST_BLOCKED", longest)
        patch.setattr(kernel, "BLOCK_QUERIES", block)
        patch.setattr(kernel, "PIECE_ELEMENTS", piece)
        got = attention(*arguments, mask)
        got_gradients = torch.autograd.grad(got, arguments, grad)
    wanted = written_out(*arguments, mask)
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)
    for a, b in zip(got_gradients, torch.autograd.grad(wanted, arguments, grad), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("scale", "bound"), [(1.0, 0.006), (2.0, 0.012), (3.0, 0.03)])
def test_bf16_differs_by_the_rounding_of_scores(scale: float, bound: float) -> None:
    """Scores of standard deviation 1, 4 and 9; they are rounded to 2^-9 of themselves."""
    exact = tuple(
        t.detach() * s for t, s in zip(inputs(2, 4, 4, 256, 64), (scale, scale, 1.0), strict=True)
    )
    grad = torch.randn(2, 4, 256, 64, dtype=torch.float64)

    def run(dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (t.bfloat16().to(dtype).requires_grad_() for t in exact)
        out = blocked_attention(q, k, v, None)[0]
        return [out, *torch.autograd.grad(out, (q, k, v), grad.bfloat16().to(dtype))]

    for got, want in zip(run(torch.bfloat16), run(torch.float64), strict=True):
        assert (got.double() - want).norm() < bound * want.norm()


def test_one_query_and_a_long_sequence_go_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> Tensor:
        raise AssertionError("not to be used here")

    q, k, v = inputs(1, 2, 2, 12, 4)
    whole = attention(q, k, v, None)
    monkeypatch.setattr(kernel, "blocked_attention", refuse)
    last = attention(q[:, :, 11:], k, v, None)
    torch.testing.assert_close(last, whole[:, :, 11:], atol=1e-12, rtol=0)
    monkeypatch.setattr(kernel, "LONGEST_BLOCKED", 11)
    torch.testing.assert_close(attention(q, k, v, None), whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_operator_is_what_it_tells_the_compiler(kv_heads: int) -> None:
    """Shapes, strides, schema and gradients, by torch's own checks."""
    q, k, v = inputs(2, 4, kv_heads, 130, 8)
    torch.library.opcheck(blocked_attention, (q, k, v, None))
    end = q[:, :, 100:].detach().requires_grad_()
    torch.library.opcheck(blocked_attention, (end, k, v, None))
    torch.library.opcheck(blocked_attention, (q, k, v, torch.ones(1, 1, 130, 130).tril().bool()))
