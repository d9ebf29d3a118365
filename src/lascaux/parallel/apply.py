"""Applies a plan to a model: tensor parallel rows, context, recomputation, compilation, FSDP.

The model is made on the meta device, split, and only then given memory and its initial weights, so
that no process ever holds more than its part. Parameters are DTensors; a module computes with the
local tensors in them, and what is exchanged stands in `collectives.py`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lascaux.config.schema import Config
from lascaux.model.attention import Attend
from lascaux.model.init import initial_tensor
from lascaux.model.moe import Experts, routers_of
from lascaux.model.transformer import Transformer
from lascaux.parallel.blocks import prepare_blocks
from lascaux.parallel.collectives import gather, own_piece, scatter_sum
from lascaux.parallel.context import split_context
from lascaux.parallel.experts import split_experts
from lascaux.parallel.plan import Row, find_row, split_dim, tensor_plan
from lascaux.parallel.shards import fill, local
from lascaux.parallel.vocabulary import split_cross_entropy
from lascaux.parallel.world import World

SEQUENCE_DIM = 1

Initialise = Callable[[Transformer, torch.device, int], None]
"""memory and weights for this process's part of a model on the meta device, from a seed"""


def split_model(model: Transformer, world: World, config: Config, dtype: torch.dtype) -> None:
    """Split a model that is on the meta device, or part of one; it computes in `dtype`."""
    assert world.mesh is not None
    if world.layout.cp > 1:
        split_context(model, world.group("cp"))
    if world.layout.ep > 1:
        split_experts(model, world)
    if world.layout.tp > 1:
        split_tensors(model, world.mesh["tp"])
    prepare_blocks(model, config.train)
    shard_weights(model, world, config, dtype)


def split_tensors(model: Transformer, mesh: DeviceMesh) -> None:
    """Carry out the table in `plan.py` on the mesh of the axis tp."""
    rows = tensor_plan(model.config)
    group = mesh.get_group()
    for name, module in model.named_modules():
        row = find_row(rows, name)
        if row is None or any(isinstance(p, DTensor) for p in module.parameters(recurse=False)):
            continue  # experts that ep has split are split by tp already
        for own, parameter in list(module.named_parameters(recurse=False)):
            full = f"{name}.{own}" if name else own
            dim = split_dim(rows, full, parameter.ndim)
            placement = Replicate() if dim is None else Shard(dim)
            placed = distribute_tensor(parameter.data, mesh, [placement], src_data_rank=None)
            kept = nn.Parameter(placed, requires_grad=parameter.requires_grad)
            module.register_parameter(own, kept)
        if name:
            _compute_locally(module, row, group)
    model.loss.forward = _split_loss(group)
    for attend in (m for m in model.modules() if isinstance(m, Attend)):
        attend.forward = _with_own_heads(attend.forward, group)


def _compute_locally(module: nn.Module, row: Row, group: ProcessGroup) -> None:
    """Replace the forward pass by that of the process's own part, as the row says."""
    whole_forward: Callable[..., Any] = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        parameters = dict(module.named_parameters(recurse=False))
        module._parameters.update({n: _own(p, row, n, group) for n, p in parameters.items()})  # type: ignore[arg-type]
        try:
            if isinstance(module, nn.Embedding):
                output = _look_up(module, row, whole_forward, args[0], group)
            else:
                output = whole_forward(*args, **kwargs)
        finally:
            module._parameters.update(parameters)
        if row.after == "gather":
            return gather(output, SEQUENCE_DIM, group)
        if row.after == "scatter":
            return scatter_sum(output, SEQUENCE_DIM, group)
        return output

    module.forward = forward


def _own(parameter: Tensor, row: Row, name: str, group: ProcessGroup) -> Tensor:
    """The local part of a parameter.

    What all have whole gets this process's part of the gradient, once for each micro-batch;
    `add_tensor_parallel_gradients` sums the parts once a step.
    """
    assert isinstance(parameter, DTensor)
    own = parameter.to_local()
    if isinstance(parameter.placements[0], Shard):
        return own
    if row.weights == "columns" and name == "bias" and group.rank() > 0:
        return own * 0  # it is added once, by the first process, and the parts are summed
    return own


def _look_up(
    module: nn.Embedding,
    row: Row,
    look_up: Callable[[Tensor], Tensor],
    ids: Tensor,
    group: ProcessGroup,
) -> Tensor:
    """Rows this process has, zero for the others; with the whole table, its piece of the ids."""
    if row.weights == "whole":
        return look_up(own_piece(ids, SEQUENCE_DIM, group))
    num_rows = len(module.weight)
    here = ids - group.rank() * num_rows
    inside = (here >= 0) & (here < num_rows)
    return look_up(here.where(inside, 0)) * inside[..., None]


def _split_loss(group: ProcessGroup) -> Callable[..., Tensor]:
    def forward(h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        own_bias = None if bias is None else local(bias)
        return split_cross_entropy(h, local(weight), own_bias, targets, group)

    return forward


def _with_own_heads(attend: Callable[..., Tensor], group: ProcessGroup) -> Callable[..., Tensor]:
    """ALiBi's penalty has a slope for each head of the model; a process has some of them."""

    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None and mask.shape[1] > 1:
            mask = own_piece(mask, 1, group)
        return attend(q, k, v, mask)

    return forward


def shard_weights(model: Transformer, world: World, config: Config, dtype: torch.dtype) -> None:
    """FSDP over dp_shard and cp, repeated over dp_replicate; gradients are summed in fp32.

    With one process on those axes it still keeps the weights in fp32 and computes in `dtype`.
    """
    assert world.mesh is not None
    narrow = dtype.itemsize < torch.float32.itemsize
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if narrow else None,
        reduce_dtype=torch.float32 if narrow else None,
        cast_forward_inputs=False,  # rotary angles stay in fp32
    )
    # in deterministic mode SplitModel adds up the replicas' gradients in a fixed order
    repeated = world.layout.dp_replicate > 1 and not config.train.deterministic
    mesh = world.mesh["dp_replicate", "fsdp"] if repeated else world.mesh["fsdp"]
    for router in routers_of(model).values():
        fully_shard(router, mesh=mesh)  # chooses in fp32
    if world.expert_mesh is not None:
        of_experts = world.expert_mesh["edp"]
        if repeated:
            of_experts = world.expert_mesh["dp_replicate", "edp"]
        place = _place_experts(model, of_experts.size(of_experts.ndim - 1))
        for experts in (m for m in model.modules() if isinstance(m, Experts)):
            fully_shard(experts, mesh=of_experts, mp_policy=policy, shard_placement_fn=place)
    place = _place_experts(model, world.layout.weight_shards)
    for block in model.blocks.values():
        fully_shard(block, mesh=mesh, mp_policy=policy, shard_placement_fn=place)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _place_experts(model: Transformer, size: int) -> Callable[[nn.Parameter], Shard | None]:
    """Where FSDP cuts a parameter: between experts if that comes out even, else along d_model.

    Cut between two experts over four processes, two of them would have all and two nothing.
    """
    outputs = {id(m.down.weight) for m in model.modules() if isinstance(m, Experts)}

    def place(parameter: nn.Parameter) -> Shard | None:
        if parameter.ndim < 3 or len(local(parameter)) % size == 0:
            return None
        return Shard(1 if id(parameter) in outputs else 2)

    return place


def release_weights(model: Transformer) -> None:
    """Let go of gathered weights after a forward pass that no backward pass follows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def initialise_shards(model: Transformer, device: torch.device, seed: int) -> None:
    """Memory for this process's part, and the weights that `model.init` gives a whole model."""
    model.to_empty(device=device)
    for router in routers_of(model).values():
        router.report.sums.zero_()
    fill(
        model.named_parameters(),
        lambda name, shape: initial_tensor(name, shape, model.config, seed),
    )
