"""softmax(q kᵀ / √K + mask) v, computed the fastest way known here for the tensors at hand.

On a CPU torch's fused attention takes several times as long as the matrix products in it
(docs/performance.md). `blocked_attention` is those products: blocks of queries that leave out the
keys after them, in pieces that stay in the cache. It keeps the probabilities for the backward pass,
T S for each head, so longer sequences use torch's kernel, as do other devices.
Shapes: B batch, T queries, S keys (T and what a cache holds), H heads, G kv heads, R = H / G,
K head width, Q queries of a block.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

BLOCK_QUERIES = 128
PIECE_ELEMENTS = 2**21
LONGEST_BLOCKED = 2048


def attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G S K"],
    v: Float[Tensor, "B G S K"],
    mask: Bool[Tensor, "#B #H T S"] | Float[Tensor, "#B #H T S"] | None,
) -> Float[Tensor, "B H T K"]:
    """Attention of every query to the keys it may see, never one after itself.

    A boolean mask is true where a query sees a key, any other is added to the scores; None means
    plainly causal. The last query stands at the last key.
    """
    num_queries, num_keys = q.shape[2], k.shape[2]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    small = num_queries * num_keys <= LONGEST_BLOCKED**2
    if q.device.type == "cpu" and 1 < num_queries <= num_keys and small:
        return blocked_attention(q, k, v, mask)[0]
    if mask is None and 1 < num_queries < num_keys:  # torch's is_causal aligns the first ones
        return _end_of_sequence(q, k, v)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and num_queries > 1,
        enable_gqa=k.shape[1] != q.shape[1],
    )


def _end_of_sequence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plainly causal attention of the last queries, by torch; on a GPU without a mask in memory."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) if group > 1 else t for t in (k, v))
    num_queries, num_keys = q.shape[2], k.shape[2]
    if q.device.type == "cpu":
        visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
        mask = visible.tril(num_keys - num_queries)
    else:
        mask = causal_lower_right(num_queries, num_keys)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@torch.library.custom_op("lascaux::blocked_attention", mutates_args=())
def blocked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attention as matrix products that skip most of the hidden half.

    Returns the output and what the backward pass needs: q / √K, k and v side by side in memory, and
    the probabilities of the blocks one after the other. Scores are rounded to the dtype of the
    inputs before the softmax, as they are not in torch's kernel: in bf16 by 2^-9 of themselves,
    which shows where they are large (docs/performance.md). Probabilities are normalised in fp32 and
    kept in that dtype. An operator of its own, since torch.compile would unroll the blocks.
    """
    (B, H, T, K), (G, S) = q.shape, k.shape[1:3]
    scaled = torch.mul(q, 1 / math.sqrt(K), out=q.new_empty(q.shape))
    k, v = (t.clone(memory_format=torch.contiguous_format) for t in (k, v))
    grouped = scaled.view(B, G, H // G, T, K)
    future = q.new_full((BLOCK_QUERIES, BLOCK_QUERIES), float("-inf")).triu_(1)
    out = _by_token(q)
    probabilities = q.new_empty(_num_probabilities(B, H, T, S))
    for seqs, rows, keys, p in _with_probabilities(grouped, S, probabilities):
        torch.bmm(_queries(grouped, seqs, rows), k[seqs, :, keys].flatten(0, 1).mT, out=p)
        size = rows.stop - rows.start
        by_head = p.view(-1, H, size, keys.stop)
        if mask is None:  # only the block's own keys can lie after a query
            by_head[..., keys.stop - size :] += future[:size, :size]
        else:
            visible = mask[seqs if len(mask) > 1 else slice(None), :, rows, keys]
            if visible.dtype == torch.bool:
                by_head.masked_fill_(~visible, float("-inf"))
            else:
                by_head += visible
        torch.softmax(p, dim=-1, out=p)
        block = out[seqs, :, rows]
        block.copy_(torch.bmm(p, v[seqs, :, keys].flatten(0, 1)).view(block.shape))
    return out, scaled, k, v, probabilities


@torch.library.custom_op("lascaux::blocked_attention_backward", mutates_args=())
def blocked_attention_backward(
    grad: Tensor, scaled: Tensor, k: Tensor, v: Tensor, probabilities: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; with softmax rows p, ds = p (dp - Σ p dp)."""
    (B, H, T, K), G = grad.shape, k.shape[1]
    grouped = scaled.view(B, G, H // G, T, K)
    dout = grad.contiguous().view(grouped.shape)
    dq, dk, dv = _by_token(grad), _by_token(k), _by_token(v)
    blocks = list(_with_probabilities(grouped, k.shape[2], probabilities))
    for seqs, rows, keys, p in reversed(blocks):  # a sequence's last block has all its keys
        block_dout = _queries(dout, seqs, rows)
        ds = torch.bmm(block_dout, v[seqs, :, keys].flatten(0, 1).mT)
        torch.ops.aten._softmax_backward_data(ds, p, -1, p.dtype, grad_input=ds)
        block = dq[seqs, :, rows]
        block.copy_(torch.bmm(ds, k[seqs, :, keys].flatten(0, 1)).view(block.shape))
        for total, part in (
            (dk[seqs, :, keys], torch.bmm(ds.mT, _queries(grouped, seqs, rows))),
            (dv[seqs, :, keys], torch.bmm(p.mT, block_dout)),
        ):
            if rows.stop == T:
                total.copy_(part.view(total.shape))
            else:
                total.add_(part.view(total.shape))
    return dq.mul_(1 / math.sqrt(K)), dk, dv


@blocked_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
    B, H, T, _ = q.shape
    kept = (t.new_empty(t.shape) for t in (q, k, v))
    return _by_token(q), *kept, q.new_empty(_num_probabilities(B, H, T, k.shape[2]))


@blocked_attention_backward.register_fake
def _(grad: Tensor, scaled: Tensor, k: Tensor, v: Tensor, p: Tensor) -> tuple[Tensor, ...]:
    return _by_token(grad), _by_token(k), _by_token(v)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # the others would each get a tensor of zeros
    ctx.save_for_backward(*output[1:])


def _differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *blocked_attention_backward(grad, *ctx.saved_tensors), None


blocked_attention.register_autograd(_differentiate, setup_context=_keep)


def _by_token(like: Float[Tensor, "B H T K"]) -> Float[Tensor, "B H T K"]:
    """Room for a result that lies in memory as (B, T, H, K): joining the heads copies nothing."""
    B, H, T, K = like.shape
    return like.new_empty(B, T, H, K).transpose(1, 2)


def _blocks(
    num_seqs: int, num_heads: int, num_queries: int, num_keys: int
) -> Iterator[tuple[slice, slice, slice]]:
    """(sequences, queries, keys) of each block; its keys end with that of its last query."""
    seqs = max(1, PIECE_ELEMENTS // (num_heads * BLOCK_QUERIES * num_keys))
    before = num_keys - num_queries
    for first in range(0, num_seqs, seqs):
        some = slice(first, min(first + seqs, num_seqs))
        for start in range(0, num_queries, BLOCK_QUERIES):
            stop = min(start + BLOCK_QUERIES, num_queries)
            yield some, slice(start, stop), slice(0, before + stop)


def _num_probabilities(num_seqs: int, num_heads: int, num_queries: int, num_keys: int) -> int:
    """What all blocks have together."""
    blocks = _blocks(num_seqs, num_heads, num_queries, num_keys)
    return sum((s.stop - s.start) * num_heads * (r.stop - r.start) * k.stop for s, r, k in blocks)


def _with_probabilities(
    grouped: Float[Tensor, "B G R T K"], num_keys: int, flat: Tensor
) -> Iterator[tuple[slice, slice, slice, Float[Tensor, "BG RQ S"]]]:
    """The blocks, each with its probabilities' place in `flat`."""
    B, G, R, T, _ = grouped.shape
    first = 0
    for seqs, rows, keys in _blocks(B, G * R, T, num_keys):
        shape = (G * (seqs.stop - seqs.start), R * (rows.stop - rows.start), keys.stop)
        last = first + math.prod(shape)
        yield seqs, rows, keys, flat[first:last].view(shape)
        first = last


def _queries(x: Float[Tensor, "B G R T K"], seqs: slice, rows: slice) -> Tensor:
    """The block's rows, the query heads of one kv head below each other: (B·G, R·Q, K)."""
    return x[seqs, :, :, rows].flatten(2, 3).flatten(0, 1)
