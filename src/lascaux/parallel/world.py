"""The processes of a layout, connected: their meshes, and sums over them.

Every sum of numbers that a step needs goes through here; with one process nothing is exchanged.
"""

import atexit
import logging
import secrets
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from lascaux.errors import ProcessLost
from lascaux.parallel.layout import AXES, Layout
from lascaux.parallel.runtime import Process
from lascaux.parallel.shards import local

MESH_AXES = ("pp", "dp_replicate", "fsdp", "tp")
"""fsdp is dp_shard and cp together: all of them hold a shard of the same weights"""
EXPERT_AXES = ("pp", "dp_replicate", "edp", "ep", "tp")
"""the same processes where there are experts to spread: fsdp is edp and ep together"""

T = TypeVar("T")


class World:
    """This process among those of a layout; `dist` must be running unless it is the only one."""

    def __init__(self, layout: Layout, rank: int, device: torch.device) -> None:
        self.layout, self.rank, self.device = layout, rank, device
        self.place = layout.place(rank)
        self.data_rank = layout.data_rank(rank)
        self.mesh: DeviceMesh | None = None
        self.expert_mesh: DeviceMesh | None = None
        if layout.world_size > 1:
            sizes = (layout.pp, layout.dp_replicate, layout.weight_shards, layout.tp)
            self.mesh = init_device_mesh(device.type, sizes, mesh_dim_names=MESH_AXES)
            fine = init_device_mesh(device.type, layout.sizes, mesh_dim_names=AXES)
            self._cp_group = fine.get_group("cp")
        if layout.ep > 1:
            edp = layout.weight_shards // layout.ep
            sizes = (layout.pp, layout.dp_replicate, edp, layout.ep, layout.tp)
            self.expert_mesh = init_device_mesh(device.type, sizes, mesh_dim_names=EXPERT_AXES)

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def group(self, axis: str) -> ProcessGroup:
        """The processes that differ from this one in one axis only."""
        if axis in ("edp", "ep"):
            assert self.expert_mesh is not None
            return self.expert_mesh.get_group(axis)
        assert self.mesh is not None
        return self._cp_group if axis == "cp" else self.mesh.get_group(axis)

    def groups(self) -> dict[str, ProcessGroup]:
        """The groups this process belongs to, by their axes."""
        found = {axis: self.group(axis) for axis in (*MESH_AXES, "cp")} if self.mesh else {}
        if self.expert_mesh is not None:
            for axis in EXPERT_AXES:
                group = self.expert_mesh.get_group(axis)
                found[axis if axis in ("edp", "ep") else f"{axis} of experts"] = group
        return found

    def sum_over(self, value: Tensor, axes: Iterable[str]) -> Tensor:
        """The sum over the processes of these mesh axes, in place."""
        if self.mesh is not None:
            for axis in axes:
                if self.mesh[axis].size() > 1:
                    dist.all_reduce(value, group=self.group(axis))
        return value

    def count_targets(self, own: int) -> int:
        """Targets of the whole batch; `own` are those of this process's sequences."""
        if self.mesh is None:
            return own
        first_piece = own if self.place["cp"] == 0 else 0  # processes of cp share sequences
        total = torch.tensor(first_piece, dtype=torch.int64, device=self.device)
        return int(self.sum_over(total, ("dp_replicate", "fsdp")))

    def add_up(self, number: float) -> float:
        """The sum over all processes."""
        if self.mesh is None:
            return number
        total = torch.tensor(number, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item()

    def add_losses(self, losses: Tensor) -> Tensor:
        """The losses of this process's micro-batches, added up over all processes in one order.

        `losses` has one entry for each micro-batch; micro-batch j of data-parallel process r of R
        is number j·R + r of the batch. Pipeline processes without the last stage give zeros.
        """
        if self.mesh is None:
            return losses.sum()
        count, parts = len(losses), self.layout.data_parallel
        of_batch = losses.new_zeros(count, parts)
        of_batch[:, self.data_rank] = losses
        return self.sum_over(of_batch, ("pp", "dp_replicate", "fsdp")).flatten().sum()

    def agree(self, wanted: bool) -> bool:
        """Whether any process wants something; all then do it in the same step."""
        if self.mesh is None:
            return wanted
        flag = torch.tensor(int(wanted), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def wait_for_all(self) -> None:
        """Go on when every process is here."""
        if self.mesh is not None:
            dist.barrier()

    def tell(self, value: T) -> T:
        """The first process's value, on every process."""
        if self.mesh is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def post(self, key: str, text: str) -> None:
        """Leave a word for the other processes; any thread may."""
        _store().set(f"lascaux/{key}", text)

    def forget(self, key: str) -> None:
        """Take back what was left."""
        _store().delete_key(f"lascaux/{key}")

    def wait_for(self, key: str, seconds: float, abandoned: threading.Event) -> str | None:
        """A word that was left for this process, or None after so long or when that is set.

        The store is asked again and again, since waiting in it would block the other threads.
        None also if the process that keeps the store is gone.
        """
        end = time.monotonic() + seconds
        with suppress(RuntimeError):
            while not _store().check([f"lascaux/{key}"]):
                if time.monotonic() > end or abandoned.wait(0.05):
                    return None
            return _store().get(f"lascaux/{key}").decode()

    def gather(self, value: T) -> list[T]:
        """The values of all processes, on each of them, by rank."""
        if self.mesh is None:
            return [value]
        values: list[Any] = [None] * self.layout.world_size
        dist.all_gather_object(values, value)
        return values

    def note_step(self, step: int) -> None:
        """Leave word of how far this process is, for the others to read if it is lost."""
        if self.mesh is not None:
            _store().set(f"lascaux/step/{self.rank}", f"{step} {time.time():.0f}")

    def describe_lost(self, step: int, error: RuntimeError) -> ProcessLost:
        """The error to end with when a collective failed: who is behind, and where."""
        behind: list[str] = []
        for rank in range(self.layout.world_size):
            with suppress(RuntimeError, ValueError):
                if not _store().check([f"lascaux/step/{rank}"]):
                    continue
                reached, when = _store().get(f"lascaux/step/{rank}").decode().split()
                if int(reached) < step:
                    behind.append(f"rank {rank} is in step {reached}")
        who = "; ".join(behind) or "all of them had begun this step"
        first_line = str(error).strip().splitlines()[0][:200]
        return ProcessLost(
            f"rank {self.rank}, step {step}: another process ended or did not answer ({who}): "
            f"{first_line}. The newest checkpoint is intact; start the job again to go on"
        )


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def connect(device: torch.device, process: Process, timeout_seconds: int) -> None:
    """Join the other processes that torchrun started; leave them when this one ends."""
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    rank, world_size = process.rank, process.world_size
    timeout = timedelta(seconds=timeout_seconds)
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
    # torchrun keeps its store when it starts the job again: the addresses in it are then old
    store = dist.PrefixStore(agree_on_prefix(store, rank, world_size, timeout_seconds), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    atexit.register(_leave)
    # putting a weight together that tp and FSDP both split takes two steps; torch warns of it
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def agree_on_prefix(store: dist.Store, rank: int, world_size: int, seconds: float) -> str:
    """A prefix for this attempt's keys, the same on all processes and never used before.

    torchrun's own count of attempts differs between nodes. So each process asks with a word of its
    own under its rank, and the first answers every word it sees with the prefix, until all have
    it: words of processes that are dead get answers that nobody reads.
    Raises: ProcessLost for a process that is not there in time.
    """
    word, end = secrets.token_hex(8), time.monotonic() + seconds
    if rank > 0:
        store.set(f"lascaux/ask/{rank}", word)
        while not store.check([f"lascaux/answer/{word}"]):
            if time.monotonic() > end:
                raise ProcessLost(f"rank {rank}: the first process has not come within {seconds} s")
            time.sleep(0.02)
        prefix = store.get(f"lascaux/answer/{word}").decode()
        store.set(f"{prefix}/has/{rank}", "")
        return prefix
    missing = set(range(1, world_size))
    while missing:
        for other in sorted(missing):
            if store.check([f"lascaux/ask/{other}"]):
                store.set(f"lascaux/answer/{store.get(f'lascaux/ask/{other}').decode()}", word)
        missing = {other for other in missing if not store.check([f"{word}/has/{other}"])}
        if missing and time.monotonic() > end:
            raise ProcessLost(f"ranks {sorted(missing)} have not come within {seconds} s")
        time.sleep(0.02)
    return word


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone or silent."""
    words = ("gloo", "connection", "timed out", "nccl", "socket")
    return dist.is_initialized() and any(word in str(error).lower() for word in words)


@torch.no_grad()
def add_tensor_parallel_gradients(world: World, parameters: Iterable[Tensor]) -> None:
    """Sum the gradients of what every tp process has whole, each having seen a part, in one go."""
    if world.layout.tp == 1:
        return
    parts = [
        local(parameter.grad)
        for parameter in parameters
        if parameter.grad is not None and not _is_split_by_tp(parameter)
    ]
    flat = world.sum_over(torch.cat([part.flatten() for part in parts]), ("tp",))
    for part, total in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.copy_(total.view(part.shape))


def gradient_norm(world: World, parameters: Iterable[Tensor]) -> Tensor:
    """The norm of the whole gradient, whatever part of each parameter a process has."""
    squares = torch.zeros(
        2, dtype=torch.float64, device=world.device
    )  # split over tp, the same on all of tp
    for parameter in parameters:
        if parameter.grad is not None:
            square = torch.linalg.vector_norm(local(parameter.grad)).square()
            squares[1 - int(_is_split_by_tp(parameter))] += square
    world.sum_over(squares, ("fsdp",))
    by_tp = world.sum_over(squares[:1].clone(), ("tp",))
    return world.sum_over(by_tp + squares[1:], ("pp",)).sqrt()[0]


def _is_split_by_tp(parameter: Tensor) -> bool:
    if not isinstance(parameter, DTensor) or "tp" not in (
        parameter.device_mesh.mesh_dim_names or ()
    ):
        return False
    names = parameter.device_mesh.mesh_dim_names
    assert names is not None
    return isinstance(parameter.placements[names.index("tp")], Shard)
