"""Cross-entropy of an output head's logits, without ever holding all of them.

Logits exist for some tokens at a time, as in Cut Cross-Entropy (Wijmans et al. 2024); gradients are
made in the forward pass, while the logits are at hand. `F.linear_cross_entropy` with options does
the same, but sums in bf16 and takes four times as long on a CPU (docs/performance.md).
Shapes: N tokens, D d_model, V rows of the vocabulary.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = 2**27  # 256 MiB in bf16
SLICE_LOGITS = 2**20  # 4 MiB in fp32: what the cores keep in their caches
NO_TARGET = -100


def linear_cross_entropy(
    h: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    bias: Float[Tensor, " V"] | None,
    targets: Int[Tensor, " N"],
) -> Float[Tensor, ""]:
    """Sum of the cross-entropies of `h weightᵀ + bias`, nats; targets of -100 count nothing.

    Matrix products are in the dtype of `h`; softmax, sums and the sum of the weight's gradient over
    chunks in fp32 at least. There is no second derivative.
    """
    return LinearCrossEntropy.apply(h, weight, bias, targets, torch.is_grad_enabled())


class LinearCrossEntropy(torch.autograd.Function):
    """The sum of losses; its gradients are ready when it is."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        with_gradients: bool,
    ) -> Tensor:
        """Loss and, kept in `ctx`, the gradients of its sum."""
        wide = torch.promote_types(h.dtype, torch.float32)
        loss = h.new_zeros((), dtype=wide)
        dh = torch.empty_like(h) if with_gradients else None
        dweight = dbias = None
        for rows in _slices(len(h), CHUNK_LOGITS // len(weight)):
            logits = torch.nn.functional.linear(h[rows], weight, bias)
            size = SLICE_LOGITS // len(weight) if h.device.type == "cpu" else len(logits)
            for part in _slices(len(logits), size):
                loss += _loss_sum(logits[part], targets[rows][part], wide, with_gradients)
            if dh is None:
                continue
            torch.mm(logits, weight, out=dh[rows])
            dweight = _add(dweight, logits.mT @ h[rows], wide)
            if bias is not None:
                dbias = _add(dbias, logits.sum(0, dtype=wide), wide)
        if dweight is not None:
            dweight = dweight.to(weight.dtype)
        ctx.save_for_backward(dh, dweight, None if dbias is None else dbias.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """The kept gradients times that of the sum."""
        return (
            *(None if kept is None else kept.mul_(grad) for kept in ctx.saved_tensors),
            None,
            None,
        )


def _loss_sum(logits: Tensor, targets: Tensor, wide: torch.dtype, to_gradient: bool) -> Tensor:
    """Sum of the losses; `to_gradient` turns the logits, in place, into its gradient."""
    counts = targets != NO_TARGET
    index = targets.where(counts, 0)[:, None]
    log_p = torch.log_softmax(logits, dim=-1, dtype=wide)
    loss = -log_p.gather(1, index)[:, 0].where(counts, 0.0).sum()
    if to_gradient:
        p = log_p.exp_()
        p.scatter_add_(1, index, p.new_full((), -1.0).expand_as(index))
        logits.copy_(p.mul_(counts[:, None]))
    return loss


def _slices(length: int, size: int) -> list[slice]:
    size = max(1, size)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _add(total: Tensor | None, part: Tensor, wide: torch.dtype) -> Tensor:
    """A sum over chunks, in the wide dtype from the second chunk on."""
    return part if total is None else total.to(wide).add_(part)
