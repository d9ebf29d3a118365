"""How often a block talks under tensor parallelism; a split model is put together right."""

from pathlib import Path
from typing import Any

import pytest
import torch

import lascaux.checkpoint.parts as parts
import lascaux.parallel.collectives as collectives
from lascaux.checkpoint.files import FileRecord
from lascaux.checkpoint.parts import read_slabs, saved_tensors
from lascaux.checkpoint.save import write_tensors
from lascaux.errors import CheckpointError
from lascaux.optim.optimizer import load_state_tensors, state_tensors
from lascaux.parallel.layout import resolve_layout
from lascaux.parallel.network import split_network
from lascaux.parallel.plan import TIED_COPY
from lascaux.parallel.shards import fill, local, slab_of
from lascaux.parallel.split import SplitModel
from lascaux.parallel.world import World
from lascaux.train.saving import own_pieces
from lascaux.train.step import split_batch
from tests.distributed.ranks import on_ranks
from tests.distributed.test_layouts import CPU, make_batch, make_config, make_optimizers


def count(rank: int, model: str) -> dict[str, int]:
    """Collectives along the sequence in one micro-batch's forward and backward pass."""
    config = make_config(model, tp=2)
    world = World(resolve_layout(config, 2), rank, CPU)
    network = split_network(config, world, torch.float32)
    assert isinstance(network, SplitModel)
    counts = {"all_gather": 0, "_reduce_scatter": 0}
    for name in counts:
        original = getattr(collectives, name)

        def counted(*arguments: Any, name: str = name, original: Any = original) -> Any:
            counts[name] += 1
            return original(*arguments)

        setattr(collectives, name, counted)
    network.forward_backward(split_batch(make_batch(0, False), 2)[:1], 1, lambda _: None)
    return counts


def test_a_parallel_block_reduces_once() -> None:
    """Four layers; a gather and a scatter make an all-reduce, once forwards and once backwards."""
    (sequential, _), (parallel, _) = (on_ranks(2, count, m) for m in ("sequential", "parallel"))
    outside = 2  # embedding and head: a pair forwards, a pair backwards
    assert sequential == {"all_gather": 4 * 4 + outside, "_reduce_scatter": 4 * 4 + outside}
    assert parallel == {"all_gather": 2 * 4 + outside, "_reduce_scatter": 2 * 4 + outside}


def make(name: str, shape: torch.Size) -> torch.Tensor:
    seed = sum(map(ord, name))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def split(rank: int, parallel: dict[str, Any], optimizer: str) -> tuple[Any, World, Any]:
    model, axes = parallel["model"], {k: n for k, n in parallel.items() if k != "model"}
    config = make_config(model, **axes)
    world = World(resolve_layout(config, 4), rank, CPU)
    network = split_network(config, world, torch.float32)
    return network, world, make_optimizers(network, config, optimizer)


def write(rank: int, parallel: dict[str, Any], folder: Path) -> dict[str, FileRecord]:
    """This process's files, once its weights and moments are what `make` says."""
    network, world, optimizers = split(rank, parallel, "adamw")
    named = list(network.named_parameters())
    for _, parameter in named:
        parameter.grad = torch.zeros_like(parameter)
    optimizers[0].step()
    weights = {"embed.weight" if n == TIED_COPY else n: p for n, p in named}
    state = state_tensors(named, optimizers)
    fill(weights.items(), make)
    fill(((n, t) for n, t in state.items() if t.ndim > 0), make)
    return write_tensors(folder, own_pieces(named, state, world, True), rank)


def read(rank: int, parallel: dict[str, Any], folder: Path, files: dict[str, FileRecord]) -> bool:
    """Whether this process gets its part of weights and moments."""
    network, _, optimizers = split(rank, parallel, "adamw")
    named = list(network.named_parameters())
    names = {TIED_COPY: "embed.weight"}
    wanted = {names.get(n, n): slab_of(p) for n, p in named}
    found = read_slabs(folder, files, "model", wanted)
    same = all(
        torch.equal(found[n], make(n, p.shape)[wanted[n]])
        for n, p in ((names.get(n, n), p) for n, p in named)
    )
    load_state_tensors(
        named,
        optimizers,
        saved_tensors(folder, files, "optimizer"),
        lambda slabs: read_slabs(folder, files, "optimizer", slabs),
        part=True,
    )
    return same and all(
        t.item() == 1 if t.ndim == 0 else torch.equal(local(t), make(n, t.shape)[slab_of(t)])
        for n, t in state_tensors([(names.get(n, n), p) for n, p in named], optimizers).items()
    )


PLACES = [
    dict(model="tied", dp_shard=4),
    dict(model="tied", dp_replicate=2, tp=2),
    dict(model="tied", dp_shard=2, tp=2),
    dict(model="tied", pp=2, tp=2),
    dict(model="tied", pp=2, dp_replicate=2),
    dict(model="moe", dp_shard=4),
    dict(model="moe", dp_shard=4, ep=2),
    dict(model="moe", dp_shard=4, ep=4),
    dict(model="moe", dp_shard=2, tp=2, ep=2),
    dict(model="moe", dp_replicate=2, dp_shard=2, ep=2),
]


@pytest.mark.parametrize("number", range(len(PLACES)), ids=[str(place) for place in PLACES])
def test_parts_go_from_any_layout_to_any_other(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "LARGEST_FILE_BYTES", 5_000)  # many files, tensors cut in rows
    records = on_ranks(4, write, PLACES[number], tmp_path)
    files: dict[str, FileRecord] = {}
    for own in records:
        assert not files.keys() & own.keys()
        files |= own
    assert len(files) > 8
    whole = read_slabs(tmp_path, files, "model")
    assert len(whole) > 30
    assert all(torch.equal(tensor, make(name, tensor.shape)) for name, tensor in whole.items())
    half = len(PLACES) // 2
    others = [half * (number // half) + (number + shift) % half for shift in range(3)]
    for to in (PLACES[other] for other in others):
        assert all(on_ranks(4, read, to, tmp_path, files))
    (tmp_path / min(files)).unlink()
    rest = {name: record for name, record in files.items() if name != min(files)}
    with pytest.raises(CheckpointError, match="has not all of"):
        read_slabs(tmp_path, rest, "model", {n: slab_of(t) for n, t in whole.items()})
