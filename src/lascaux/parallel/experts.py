"""Expert parallelism: each process of the axis ep has some of the experts, and rows travel to them.

The axis lies inside FSDP's: the processes that shard the dense weights are edp x ep, and weights of
an expert are sharded over edp alone. Rows go out and come back by all-to-all; backwards that adds
up what the ep processes' tokens say of an expert, and FSDP's sum over edp does the rest. Sums need
no scale. Shapes: P pairs of a token and an expert here, E experts of the layer, R pairs received,
W processes, L experts of each, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import Shard, distribute_tensor

from lascaux.kernels.grouped import take_rows
from lascaux.model.moe import Experts, Spread
from lascaux.model.transformer import Transformer
from lascaux.parallel.plan import split_dim, tensor_plan
from lascaux.parallel.shards import local
from lascaux.parallel.world import World


def split_experts(model: Transformer, world: World) -> None:
    """Give this process its experts of a model on the meta device, and send rows to the others."""
    assert world.expert_mesh is not None
    mesh = world.expert_mesh["ep", "tp"] if world.layout.tp > 1 else world.expert_mesh["ep"]
    rows = tensor_plan(model.config)
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            for own, parameter in list(module.named_parameters()):
                full = f"{name}.{own}"
                placements = [Shard(0)]
                if world.layout.tp > 1:
                    dim = split_dim(rows, full, parameter.ndim)
                    assert dim is not None
                    placements.append(Shard(dim))
                placed = distribute_tensor(parameter.data, mesh, placements, src_data_rank=None)
                matrix, _, leaf = own.rpartition(".")
                module.get_submodule(matrix).register_parameter(leaf, nn.Parameter(placed))
            for matrix in module.children():
                matrix.forward = _with_local_weights(matrix)
        elif isinstance(module, Spread):
            module.forward = Exchange(world.group("ep"))


def _with_local_weights(module: nn.Module) -> Callable[..., Tensor]:
    whole_forward: Callable[..., Tensor] = module.forward

    def forward(*args: Any) -> Tensor:
        parameters = dict(module.named_parameters(recurse=False))
        own = {name: local(parameter) for name, parameter in parameters.items()}
        module._parameters.update(own)  # type: ignore[arg-type]
        try:
            return whole_forward(*args)
        finally:
            module._parameters.update(parameters)

    return forward


class Exchange:
    """`Spread` over the processes of a group: process i has the i-th part of the experts."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def __call__(
        self,
        x: Float[Tensor, "P D"],
        counts: Int[Tensor, " E"],
        experts: Callable[[Tensor, Tensor], Tensor],
    ) -> Float[Tensor, "P D"]:
        """What the experts make of the rows, in the order of the rows."""
        size = self.group.size()
        arrived = torch.empty_like(counts)
        dist.all_to_all_single(arrived, counts, group=self.group)
        by_process = arrived.view(size, -1)  # rows from each process for each expert here
        sent = row_counts(counts.view(size, -1), len(x))
        received = row_counts(by_process, len(x))
        rows = all_to_all(x, received, sent, self.group)
        order = _by_expert(by_process, sum(received))
        made = experts(take_rows(rows, order, 1), by_process.sum(0))
        return all_to_all(take_rows(made, order.argsort(), 1), sent, received, self.group)


def row_counts(by_process: Int[Tensor, "W L"], rows: int) -> list[int]:
    """Rows to or from each process, `rows` where choices are even; waits for a GPU."""
    return by_process.sum(1).tolist()


def _by_expert(by_process: Int[Tensor, "W L"], rows: int) -> Int[Tensor, " R"]:
    """The order that takes rows which came process by process, each by expert, to their experts."""
    size, local = by_process.shape
    expert = torch.arange(local, device=by_process.device).repeat(size)
    belongs = expert.repeat_interleave(by_process.flatten(), output_size=rows)
    return belongs.argsort(stable=True)


def all_to_all(
    x: Float[Tensor, "P D"], received: list[int], sent: list[int], group: ProcessGroup
) -> Float[Tensor, "R D"]:
    """Rows to each process in turn; gradients travel back."""
    return _AllToAll.apply(x, received, sent, group)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, received: list[int], sent: list[int], group: ProcessGroup
    ) -> Tensor:
        ctx.received, ctx.sent, ctx.group = received, sent, group
        return _exchange(x, received, sent, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _exchange(grad, ctx.sent, ctx.received, ctx.group), None, None, None


def _exchange(x: Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> Tensor:
    rows = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(rows, x.contiguous(), received, sent, group=group)
    return rows
