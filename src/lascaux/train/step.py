"""One optimizer step: loss and gradients over the micro-batches, clip, update.

Sums, not means: the loss is the sum of token losses over the number of targets in the whole batch,
known before the first backward pass, so no way of splitting the batch changes its scale.
Shapes: B batch, T sequence.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from lascaux.data.loader import NO_TARGET, Batch
from lascaux.errors import LascauxError
from lascaux.train.precision import WorkingCopy


class NonFiniteError(LascauxError):
    """Loss or gradient is not a finite number; weights and optimizer are as before the step."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step measured: cross-entropy in nats per token, gradient norm before clipping."""

    loss: float
    grad_norm: float


def ignore_lap(part: str) -> None:
    """Nobody is timing."""


def loss_sum(forward: Callable[..., Tensor], batch: Batch, device: torch.device) -> Tensor:
    """Sum of the token losses of one micro-batch, nats, in fp32."""
    return forward(
        to_device(batch.tokens, device),
        to_device(batch.targets, device),
        positions=None if batch.positions is None else to_device(batch.positions, device),
        document_ids=None if batch.document_ids is None else to_device(batch.document_ids, device),
    )


def to_device(array: object, device: torch.device) -> Tensor:
    """A numpy array as a tensor on the device."""
    return torch.as_tensor(array, device=device)


def train_step(
    working: WorkingCopy,
    optimizers: Sequence[Optimizer],
    microbatches: Sequence[Batch],
    *,
    device: torch.device,
    grad_clip: float | None,
    scaler: torch.amp.GradScaler,
    lap: Callable[[str], None] = ignore_lap,
) -> StepResult:
    """Update the model once from the micro-batches of one batch.

    Where gradients overflowed in fp16, the scaler leaves the update out and lowers its scale. `lap`
    is called at the end of each part with its name: copy, forward, backward, optimizer.
    Raises: NonFiniteError before anything is changed.
    """
    model = working.model
    num_targets = sum(int((batch.targets != NO_TARGET).sum()) for batch in microbatches)
    losses: list[Tensor] = []
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    working.refresh()
    lap("copy")
    for batch in microbatches:
        loss = loss_sum(working.network, batch, device) / max(1, num_targets)
        losses.append(loss.detach())
        lap("forward")
        scaler.scale(loss).backward()
        lap("backward")
        working.collect_gradients()
        lap("copy")
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = get_total_norm(gradients)
    loss_value, grad_norm = torch.stack(losses).sum().item(), norm.item()
    overflowed = scaler.is_enabled() and not math.isfinite(grad_norm)
    if not math.isfinite(loss_value) or not (math.isfinite(grad_norm) or overflowed):
        raise NonFiniteError(describe_non_finite(model, loss_value, grad_norm))
    if grad_clip is not None:
        clip_grads_with_norm_(model.parameters(), grad_clip, norm)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    lap("optimizer")
    return StepResult(loss_value, grad_norm)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed; torch has a class of its own for it on GPUs alone."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


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
