"""A model split over processes, with the interface of `train.precision.WorkingCopy`."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.nn.utils import get_total_norm

from lascaux.config.schema import Config
from lascaux.data.loader import Batch
from lascaux.model.moe import routers_of, set_loss_scale
from lascaux.model.transformer import Transformer
from lascaux.parallel.apply import Initialise, release_weights, split_model
from lascaux.parallel.collectives import all_gather
from lascaux.parallel.context import cut_sequences
from lascaux.parallel.microbatch import TreeSum, add_pairs, loss_scale, loss_sum
from lascaux.parallel.shards import as_shard, local, whole
from lascaux.parallel.world import World, add_tensor_parallel_gradients, gradient_norm

Lap = Callable[[str], None]


class SplitModel:
    """One model over the processes of a world, without a pipeline."""

    def __init__(
        self, config: Config, world: World, dtype: torch.dtype, initialise: Initialise
    ) -> None:
        self.world, self.model_config = world, config.model
        with torch.device("meta"):
            self.model = Transformer(config.model)
        split_model(self.model, world, config, dtype)
        initialise(self.model, world.device, config.train.seed)
        self._sharded = list(self.model.named_parameters())  # FSDP swaps them in the model
        self.routers = routers_of(self.model)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=False)
        self.deterministic = config.train.deterministic
        if self.deterministic and world.layout.dp_shard > 1:
            reduce = TreeReduceScatter()
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.set_custom_reduce_scatter(reduce)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter this process has a part of, once."""
        return iter(self._sharded)

    def gradient_norm(self) -> Tensor:
        """The norm of the whole gradient, on every process."""
        if self.deterministic:
            gradients = [whole(p.grad) for _, p in self.named_parameters() if p.grad is not None]
            return get_total_norm(gradients)
        parameters = [parameter for _, parameter in self.named_parameters()]
        return gradient_norm(self.world, parameters)

    def refresh(self) -> None:
        """FSDP rounds the weights anew each time it gathers them."""

    def forward_backward(self, microbatches: Sequence[Batch], num_targets: int, lap: Lap) -> Tensor:
        """Gradients of the sum of losses over `num_targets`; returns each micro-batch's share."""
        set_loss_scale(self.routers, loss_scale(microbatches, self.world))
        if self.deterministic:
            return self._in_fixed_order(microbatches, num_targets, lap)
        losses = []
        fsdp = cast(FSDPModule, self.model)
        for number, batch in enumerate(microbatches, start=1):
            fsdp.set_requires_all_reduce(number == len(microbatches))
            losses.append(self._backward(batch, num_targets, lap))
        add_tensor_parallel_gradients(self.world, (p for _, p in self.named_parameters()))
        return torch.stack(losses)

    def _backward(self, batch: Batch, num_targets: int, lap: Lap) -> Tensor:
        loss = self._sum_losses(batch) / num_targets
        lap("forward")
        loss.backward()
        lap("backward")
        return loss.detach()

    num_microbatches = 1

    def sum_losses(self, microbatches: Sequence[Batch]) -> Tensor:
        """The sum of losses of this process's piece of micro-batches, without gradients."""
        total = torch.stack([self._sum_losses(batch) for batch in microbatches]).sum()
        release_weights(self.model)
        return total

    def _sum_losses(self, batch: Batch) -> Tensor:
        layout = self.world.layout
        if layout.cp > 1:
            batch = cut_sequences(batch, self.world.place["cp"], layout.cp)
        return loss_sum(self.model, batch, self.world.device)

    def _in_fixed_order(self, microbatches: Sequence[Batch], num_targets: int, lap: Lap) -> Tensor:
        parameters = [p for _, p in self.named_parameters()]
        total, losses = TreeSum(), []
        for batch in microbatches:
            losses.append(self._backward(batch, num_targets, lap))
            gradients = [local(cast(Tensor, p.grad)) for p in parameters]
            total.add(self._over_replicas(gradients))
            for parameter in parameters:
                parameter.grad = None
        for parameter, gradient in zip(parameters, total.result(), strict=True):
            parameter.grad = as_shard(gradient, parameter)
        return torch.stack(losses)

    def _over_replicas(self, gradients: list[Tensor]) -> list[Tensor]:
        replicas = self.world.layout.dp_replicate
        if replicas == 1:
            return gradients
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        parts = all_gather(flat, 0, self.world.group("dp_replicate")).chunk(replicas)
        summed = add_pairs(list(parts)).split([gradient.numel() for gradient in gradients])
        return [s.view(g.shape) for s, g in zip(summed, gradients, strict=True)]


class TreeReduceScatter(ReduceScatter):
    """A reduce-scatter that adds neighbours first, for FSDP's `set_custom_reduce_scatter`."""

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Room for what is sent or received."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Exchange the pieces and add up what came for this process."""
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        output_tensor.copy_(add_pairs(list(received.chunk(group.size()))))
