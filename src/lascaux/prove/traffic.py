"""Counts what the processes of a layout say to each other, by axis and kind."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lascaux.parallel.world import World

KINDS = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "all_gather_into_tensor": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter",
    "alltoall_base_": "all-to-all",
    "send": "send",
}
SILENT = {"recv_", "wait_tensor", "_wrap_tensor_autograd", "barrier", "broadcast_"}
"""the other end of a send; waiting; what happens once, before the first step"""


@dataclass(frozen=True, slots=True)
class Amount:
    """How often, and how many bytes: those of the largest tensor a process has in each collective.

    A ring of n processes moves (n - 1) / n of them over each link, an all-reduce twice that.
    """

    times: int = 0
    num_bytes: int = 0


Table = Mapping[tuple[str, str], Amount]
"""(axis, kind) -> amount"""


class Traffic(TorchDispatchMode):
    """While it is entered, every collective of this process is noted.

    Raises: RuntimeError for a collective it does not know, rather than leave it out.
    """

    def __init__(self, world: World) -> None:
        super().__init__()
        self._axes = {str(group.group_name): axis for axis, group in world.groups().items()}
        self._alone = {str(g.group_name) for g in world.groups().values() if g.size() == 1}
        self._amounts: defaultdict[tuple[str, str], Amount] = defaultdict(Amount)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Note the call, then make it."""
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and name not in SILENT:
            if name not in KINDS:
                raise RuntimeError(f"a collective without a kind: {func}")
            group = _group_name(args)
            if group not in self._alone:
                key = self._axes.get(group, "all"), KINDS[name]
                seen = self._amounts[key]
                self._amounts[key] = Amount(seen.times + 1, seen.num_bytes + _largest(args))
        return func(*args, **(kwargs or {}))

    def table(self) -> Table:
        """What was noted so far."""
        return dict(self._amounts)


def _group_name(args: Sequence[Any]) -> str:
    """Of the process group in a collective's arguments, which is an object or its name."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument):
            return dist.ProcessGroup.unbox(argument).group_name
    return next(a for a in reversed(args) if isinstance(a, str))


def _largest(args: Sequence[Any]) -> int:
    tensors = [a for a in args if isinstance(a, Tensor)]
    tensors += [t for a in args if isinstance(a, list) for t in a if isinstance(t, Tensor)]
    return max((math.prod(t.shape) * t.dtype.itemsize for t in tensors), default=0)
