"""One optimizer step: loss and gradients over the micro-batches, clip, update.

Sums, not means: the loss is the sum of token losses over the number of targets in the whole batch,
known before the first backward pass, so no way of splitting the batch changes its scale.
Shapes: B batch, T sequence.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lascaux.config.schema import ModelConfig
from lascaux.data.loader import NO_TARGET, Batch
from lascaux.errors import LascauxError
from lascaux.model.moe import Router, set_draws
from lascaux.parallel.shards import local
from lascaux.parallel.world import World
from lascaux.train.experts import ExpertFigures, settle_experts


class NonFiniteError(LascauxError):
    """Loss or gradient is not a finite number; weights and optimizer are as before the step."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step measured: cross-entropy in nats per token, gradient norm before clipping."""

    loss: float
    grad_norm: float
    experts: ExpertFigures | None = None


def ignore_lap(part: str) -> None:
    """Nobody is timing."""


class Network(Protocol):
    """What takes the gradients: a `WorkingCopy`, or a model split over processes."""

    scaler: torch.amp.GradScaler
    model_config: ModelConfig
    routers: dict[int, Router]
    """those that are here, by their layer"""

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Every parameter this process has a part of, with its gradient afterwards."""
        ...

    def refresh(self) -> None:
        """Take over the weights as they are now."""
        ...

    def forward_backward(
        self, microbatches: Sequence[Batch], num_targets: int, lap: Callable[[str], None]
    ) -> Tensor:
        """Gradients of the sum of losses over `num_targets`; returns each micro-batch's share."""
        ...

    def gradient_norm(self) -> Tensor:
        """The norm of the whole gradient, on every process."""
        ...


def train_step(
    network: Network,
    optimizers: Sequence[Optimizer],
    microbatches: Sequence[Batch],
    *,
    world: World,
    grad_clip: float | None,
    seed: int = 0,
    step: int = 0,
    lap: Callable[[str], None] = ignore_lap,
) -> StepResult:
    """Update the model once from this process's micro-batches of one batch.

    Where gradients overflowed in fp16, the scaler leaves the update out and lowers its scale. `lap`
    is called at the end of each part with its name: copy, forward, backward, optimizer. Random
    numbers, which routers may draw, follow from seed, step and the number of the micro-batch.
    Raises: NonFiniteError, on every process alike, before anything is changed.
    """
    scaler = network.scaler
    own_targets = sum(int((batch.targets != NO_TARGET).sum()) for batch in microbatches)
    num_targets = world.count_targets(own_targets)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    network.refresh()
    set_draws(network.routers, f"{seed}/{step}", world.data_rank, world.layout.data_parallel)
    lap("copy")
    losses = network.forward_backward(microbatches, max(1, num_targets), lap)
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = network.gradient_norm()
    loss_value, grad_norm = world.add_losses(losses).item(), norm.item()
    overflowed = scaler.is_enabled() and not math.isfinite(grad_norm)
    if not math.isfinite(loss_value) or not (math.isfinite(grad_norm) or overflowed):
        raise NonFiniteError(describe_non_finite(network, loss_value, grad_norm))
    if grad_clip is not None:
        scale_gradients(network, grad_clip, norm)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    experts = None
    if network.model_config.num_experts:
        parameters = network.named_parameters()
        experts = settle_experts(network.model_config, network.routers, parameters, world)
    lap("optimizer")
    return StepResult(loss_value, grad_norm, experts)


@torch.no_grad()
def scale_gradients(network: Network, grad_clip: float, norm: Tensor) -> None:
    """Bring a gradient that is longer than `grad_clip` to that norm (as torch does, with 1e-6)."""
    factor = (grad_clip / (norm + 1e-6)).clamp(max=1.0)
    gradients = [local(p.grad) for _, p in network.named_parameters() if p.grad is not None]
    torch._foreach_mul_(gradients, factor)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed; torch has a class of its own for it on GPUs alone."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def describe_non_finite(network: Network, loss: float, grad_norm: float) -> str:
    """Which number broke first: a weight, the loss, or a gradient."""
    for name, parameter in network.named_parameters():
        if not torch.isfinite(local(parameter)).all():
            return f"weight {name} is not finite (loss {loss}, gradient norm {grad_norm})"
    if not math.isfinite(loss):
        return f"the loss is {loss} although every weight is finite"
    for name, parameter in network.named_parameters():
        if parameter.grad is not None and not torch.isfinite(local(parameter.grad)).all():
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
