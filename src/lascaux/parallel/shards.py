"""Which part of a parameter this process holds, in the coordinates of the whole.

A parameter is split by tp along the dimension that the plan names, experts by ep along their first,
and what is left of it along its first dimension by FSDP, in pieces of equal size but for the last.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

Slab = tuple[slice, ...]
"""a range for every dimension"""


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor; an ordinary one is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor put together on every process of its mesh, which must all call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def slab_of(tensor: Tensor) -> Slab:
    """The ranges of the whole tensor that this process holds."""
    ranges = [slice(0, size) for size in tensor.shape]
    if not isinstance(tensor, DTensor):
        return tuple(ranges)
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    assert coordinate is not None and mesh.mesh_dim_names is not None
    axes = dict(
        zip(mesh.mesh_dim_names, zip(coordinate, tensor.placements, strict=True), strict=True)
    )
    for axis in ("ep", "tp", "fsdp", "edp"):  # FSDP shards what ep and tp have left
        index, placement = axes.get(axis, (0, Replicate()))
        if isinstance(placement, Replicate):
            continue
        dim: int = placement.dim  # type: ignore[attr-defined]
        start, stop = ranges[dim].start, ranges[dim].stop
        piece = -(-(stop - start) // mesh.size(mesh.mesh_dim_names.index(axis)))
        first = min(start + index * piece, stop)
        ranges[dim] = slice(first, min(first + piece, stop))
    return tuple(ranges)


def is_first_holder(tensor: Tensor) -> bool:
    """Whether no process with a smaller index holds the same part."""
    if not isinstance(tensor, DTensor):
        return True
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None
    placed = zip(coordinate, tensor.placements, strict=True)
    return all(index == 0 for index, placement in placed if isinstance(placement, Replicate))


def as_shard(own: Tensor, parameter: Tensor) -> Tensor:
    """A local tensor in the DTensor form of a parameter."""
    if not isinstance(parameter, DTensor):
        return own
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(
        own, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


@torch.no_grad()
def fill(named: Iterable[tuple[str, Tensor]], make: Callable[[str, torch.Size], Tensor]) -> None:
    """Give every tensor its part of what `make` returns for its name and whole shape."""
    for name, tensor in named:
        local(tensor).copy_(make(name, tensor.shape)[slab_of(tensor)])
