"""Cross-entropy where each process has the logits of some rows of the vocabulary.

As in Megatron-LM (Shoeybi et al. 2019, section 3): the largest logit, the sum of exponentials and
the target's logit are the only things exchanged, three numbers for each token. Logits exist for
some tokens at a time and gradients are made in the forward pass, as in `kernels/cross_entropy.py`.
Shapes: N tokens, D d_model, V rows of the vocabulary on this process.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup, ReduceOp

from lascaux.kernels.cross_entropy import CHUNK_LOGITS, NO_TARGET


def split_cross_entropy(
    h: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    bias: Float[Tensor, " V"] | None,
    targets: Int[Tensor, " N"],
    group: ProcessGroup,
) -> Float[Tensor, ""]:
    """The sum of losses over the whole vocabulary, the same on every process of the group.

    The gradient of `h` is this process's part of it. The first row here is that of the process's
    index times V.
    """
    return _SplitCrossEntropy.apply(h, weight, bias, targets, group, torch.is_grad_enabled())


class _SplitCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        group: ProcessGroup,
        with_gradients: bool,
    ) -> Tensor:
        wide = torch.promote_types(h.dtype, torch.float32)
        loss = h.new_zeros((), dtype=wide)
        dh, dweight = torch.empty_like(h), torch.zeros_like(weight, dtype=wide)
        dbias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        step = max(1, CHUNK_LOGITS // len(weight))
        for start in range(0, len(h), step):
            rows = slice(start, start + step)
            logits = torch.nn.functional.linear(h[rows], weight, bias)
            dlogits, part = _loss_and_gradient(logits.to(wide), targets[rows], group)
            loss += part
            if not with_gradients:
                continue
            dlogits = dlogits.to(h.dtype)
            torch.mm(dlogits, weight, out=dh[rows])
            dweight += dlogits.mT @ h[rows]
            if dbias is not None:
                dbias += dlogits.sum(0, dtype=wide)
        ctx.save_for_backward(
            dh, dweight.to(weight.dtype), None if dbias is None else dbias.to(weight.dtype)
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kept = (None if t is None else t.mul_(grad) for t in ctx.saved_tensors)
        return *kept, None, None, None


def _loss_and_gradient(
    logits: Tensor, targets: Tensor, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """d loss / d logits of this process's rows, and the loss of all tokens."""
    counts = targets != NO_TARGET
    own = targets - group.rank() * logits.shape[1]
    here = counts & (own >= 0) & (own < logits.shape[1])
    index = own.where(here, 0)[:, None]
    largest = logits.amax(dim=1)
    dist.all_reduce(largest, ReduceOp.MAX, group=group)
    shifted = logits - largest[:, None]
    target = shifted.gather(1, index)[:, 0].where(here, 0.0)
    p = shifted.exp_()
    sums = torch.stack([p.sum(1), target])
    dist.all_reduce(sums, group=group)
    total, target = sums
    loss = (total.log() - target).where(counts, 0.0).sum()
    p /= total[:, None]
    p.scatter_add_(1, index, -here.to(p.dtype)[:, None])
    return p.mul_(counts[:, None]), loss
