"""One optimizer step: loss and gradients over the micro-batches, clip, update.

Sums, not means: the loss is the sum of token losses over the number of targets in the whole batch,
known before the first backward pass, so no way of splitting the batch changes its scale.
Shapes: B batch, T sequence.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from lascaux.data.loader import NO_TARGET, Batch
from lascaux.errors import LascauxError
from lascaux.model.transformer import Transformer
from lascaux.train.machine import DTYPES


class NonFiniteError(LascauxError):
    """Loss or gradient is not a finite number; weights and optimizer are as before the step."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step measured: cross-entropy in nats per token, gradient norm before clipping."""

    loss: float
    grad_norm: float


def precision_context(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Autocast to `precision`; nothing for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def recompute_blocks(model: Transformer) -> None:
    """Keep only each block's input for the backward pass; a cache-free forward pass alone."""
    for block in model.blocks.values():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def loss_sum(forward: Callable[..., Tensor], batch: Batch, device: torch.device) -> Tensor:
    """Sum of the token losses of one micro-batch, nats, in fp32."""
    logits = forward(
        to_device(batch.tokens, device),
        positions=None if batch.positions is None else to_device(batch.positions, device),
        document_ids=None if batch.document_ids is None else to_device(batch.document_ids, device),
    )
    return F.cross_entropy(
        logits.flatten(0, 1).float(),
        to_device(batch.targets, device).flatten(),
        ignore_index=NO_TARGET,
        reduction="sum",
    )


def to_device(array: object, device: torch.device) -> Tensor:
    """A numpy array as a tensor on the device."""
    return torch.as_tensor(array, device=device)


def train_step(
    model: nn.Module,
    forward: Callable[..., Tensor],
    optimizers: Sequence[Optimizer],
    microbatches: Sequence[Batch],
    *,
    device: torch.device,
    precision: str,
    grad_clip: float | None,
    scaler: torch.amp.GradScaler,
) -> StepResult:
    """Update the model once from the micro-batches of one batch.

    `forward` is the model, or its compiled form. Where gradients overflowed in fp16, the scaler
    leaves the update out and lowers its scale.
    Raises: NonFiniteError before anything is changed.
    """
    num_targets = sum(int((batch.targets != NO_TARGET).sum()) for batch in microbatches)
    total = torch.zeros((), device=device)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    for batch in microbatches:
        with precision_context(device, precision):
            loss = loss_sum(forward, batch, device) / max(1, num_targets)
        scaler.scale(loss).backward()
        total += loss.detach()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = get_total_norm(gradients)
    loss_value, grad_norm = total.item(), norm.item()
    overflowed = scaler.is_enabled() and not math.isfinite(grad_norm)
    if not math.isfinite(loss_value) or not (math.isfinite(grad_norm) or overflowed):
        raise NonFiniteError(describe_non_finite(model, loss_value, grad_norm))
    if grad_clip is not None:
        clip_grads_with_norm_(model.parameters(), grad_clip, norm)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    return StepResult(loss_value, grad_norm)


def describe_non_finite(model: nn.Module, loss: float, grad_norm: float) -> str:
    """Which number broke first: a weight, the loss, or a gradient."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"weight {name} is not finite (loss {loss}, gradient norm {grad_norm})"
    if not math.isfinite(loss):
        return f"the loss is {loss} although every weight is finite"
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"the gradient of {name} is not finite (loss {loss})"
    return f"the gradient norm is {grad_norm} although every gradient is finite (loss {loss})"


def split_batch(batch: Batch, microbatch_seqs: int) -> list[Batch]:
    """The batch as micro-batches of this many sequences, in order."""
    starts = range(0, len(batch.tokens), microbatch_seqs)
    pieces = [slice(start, start + microbatch_seqs) for start in starts]
    return [
        Batch(
            batch.tokens[piece],
            batch.targets[piece],
            None if batch.document_ids is None else batch.document_ids[piece],
            None if batch.positions is None else batch.positions[piece],
        )
        for piece in pieces
    ]
