"""Every layout trains the same model: losses, gradient norms and weights against one process."""

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import pytest
import torch

from lascaux.config.check import check
from lascaux.config.schema import (
    Config,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)
from lascaux.data.loader import NO_TARGET, Batch
from lascaux.model.init import initialise
from lascaux.model.transformer import Transformer
from lascaux.optim.optimizer import build_optimizers
from lascaux.parallel.layout import AXES, resolve_layout
from lascaux.parallel.network import split_network
from lascaux.parallel.plan import TIED_COPY
from lascaux.parallel.shards import whole
from lascaux.parallel.world import World
from lascaux.train.precision import WorkingCopy
from lascaux.train.step import Network, split_batch, train_step
from tests.distributed.ranks import on_ranks

STEPS = 5
SHARED = dict(num_layers=4, d_model=32, num_heads=4, d_ff=48, vocab_size=40, max_context=32)
MODELS = {
    "sequential": ModelConfig(
        **SHARED,
        position="learned",
        attention_bias=True,
        attention_output_bias=True,
        ffn_bias=True,
        norm_bias=True,
        tie_embeddings=False,
    ),
    "parallel": ModelConfig(
        **SHARED, block="parallel", tie_embeddings=False, head_bias=True, ffn_bias=True
    ),
    "tied": ModelConfig(**SHARED, norm_bias=True, attention_output_bias=True),
    "llama": ModelConfig(
        **SHARED,
        num_kv_heads=2,
        norm="rmsnorm",
        activation="swiglu",
        qk_norm="head",
        sandwich_norm=True,
        block="parallel_two_norms",
    ),
    "moe": ModelConfig(
        **SHARED,
        num_experts=8,
        expert_d_ff=24,
        num_shared_experts=1,
        num_dense_layers=1,
        activation="swiglu",
        tie_embeddings=False,
        balance_weight=0.1,
        router_z_weight=0.01,
    ),
    "few": ModelConfig(**SHARED, num_experts=2, activation="swiglu"),
    "switch": ModelConfig(
        **SHARED, num_experts=4, experts_per_token=1, moe_every=2, capacity_factor=1.25
    ),
    "balanced": ModelConfig(
        **SHARED, num_experts=4, balance="bias", balance_rate=0.05, router_score="sigmoid"
    ),
    "jittered": ModelConfig(
        **SHARED, num_experts=4, router_jitter=0.2, balance_over="batch", balance_weight=0.1
    ),
    "bloom": ModelConfig(**SHARED, position="alibi", embedding_norm=True, ffn_bias=True),
}


@dataclasses.dataclass(frozen=True)
class Case:
    model: str
    optimizer: str = "sgd"
    documents: bool = False
    dtype: torch.dtype = torch.float32


CASES = [
    *(Case(m, o) for m in ("sequential", "parallel", "tied") for o in ("sgd", "adamw")),
    Case("sequential", "adamw", documents=True, dtype=torch.float64),
    Case("parallel", "sgd", dtype=torch.float64),
    Case("tied", "adamw", dtype=torch.float64),
    Case("llama", "sgd", dtype=torch.float64),
    Case("bloom", "adamw", documents=True, dtype=torch.float64),
    Case("llama", "muon", dtype=torch.float64),
]


def make_config(model: str, **parallel: Any) -> Config:
    config = Config(
        model=MODELS[model],
        train=TrainConfig(
            steps=STEPS, batch_tokens=8 * 16, microbatch_seqs=2, seq_len=16, precision="fp32"
        ),
        optimizer=OptimizerConfig(lr=3e-3, grad_clip=0.5),
        schedule=ScheduleConfig(warmup_steps=0),
        parallel=ParallelConfig(**parallel),
    )
    check(config)
    return config


def make_batch(step: int, documents: bool) -> Batch:
    """Half of the sequences lose half of their targets, so that no mean is a mean of means."""
    draw = np.random.default_rng(step)
    tokens = draw.integers(0, 40, (8, 17))
    targets = tokens[:, 1:].copy()
    targets[::2][draw.random((4, 16)) < 0.5] = NO_TARGET
    if not documents:
        return Batch(tokens[:, :-1].copy(), targets)
    begins = draw.random((8, 16)) < 0.2
    column = np.arange(16)
    first = np.maximum.accumulate(np.where(begins, column, 0), axis=1)
    ids = np.cumsum(begins, axis=1, dtype=np.int64)
    return Batch(tokens[:, :-1].copy(), targets, ids, column - first)


def make_optimizers(network: Network, config: Config, name: str) -> list[torch.optim.Optimizer]:
    if name == "sgd":  # Adam would hide a gradient of the wrong scale
        parameters = [p for _, p in network.named_parameters()]
        return [torch.optim.SGD(parameters, lr=0.5, momentum=0.9)]
    optimizer = dataclasses.replace(config.optimizer, name=name)
    return build_optimizers(network.named_parameters(), optimizer)


def train(network: Network, config: Config, world: World, case: Case) -> Any:
    """Losses, gradient norms and the final weights, put together."""
    optimizers = make_optimizers(network, config, case.optimizer)
    parts, mine = world.layout.data_parallel, world.data_rank
    history = []
    for step in range(STEPS):
        batches = split_batch(make_batch(step, case.documents), config.train.microbatch_seqs)
        clip = config.optimizer.grad_clip
        own = batches[mine::parts]
        result = train_step(network, optimizers, own, world=world, grad_clip=clip, step=step)
        history.append((result.loss, result.grad_norm))
    return history, {name: whole(p.detach()).clone() for name, p in network.named_parameters()}


@functools.cache
def on_one(case: Case) -> Any:
    config = make_config(case.model)
    model = Transformer(config.model).to(case.dtype)
    initialise(model, config.train.seed)
    world = World(resolve_layout(config, 1), 0, CPU)
    return train(WorkingCopy(model, config.train), config, world, case)


def on_layout(rank: int, parallel: dict[str, Any], size: int, cases: list[Case]) -> Any:
    found = []
    for case in cases:
        torch.set_default_dtype(case.dtype)
        config = make_config(case.model, **parallel)
        world = World(resolve_layout(config, size), rank, CPU)
        found.append(train(split_network(config, world, case.dtype), config, world, case))
    return found


CPU = torch.device("cpu")
EXPERT_CASES = [
    *(Case(m, "sgd", dtype=d) for m in ("moe", "switch") for d in (torch.float32, torch.float64)),
    Case("moe", "muon", dtype=torch.float64),
    Case("few", "adamw", dtype=torch.float64),
    Case("balanced", "adamw", dtype=torch.float64),
    Case("jittered", "sgd", dtype=torch.float64),
]
EXPERT_LAYOUTS: list[dict[str, Any]] = [
    dict(dp_shard=2, ep=2),
    dict(dp_shard=4, ep=2),
    dict(dp_shard=4, ep=4),
    dict(dp_replicate=2, dp_shard=2, ep=2),
    dict(dp_shard=2, tp=2, ep=2),
    dict(dp_shard=2, pp=2, ep=2),
    dict(dp_shard=4),  # without ep: some are cut along the width of the residual stream
    dict(cp=2, tp=2),
]
LAYOUTS: list[dict[str, Any]] = [
    dict(dp_replicate=2),
    dict(dp_shard=2),
    dict(tp=2),
    dict(cp=2),
    dict(pp=2),
    dict(pp=2, virtual_pp=2, schedule="interleaved"),
    dict(dp_replicate=2, dp_shard=2),
    dict(dp_replicate=2, tp=2),
    dict(dp_replicate=2, cp=2),
    dict(dp_replicate=2, pp=2),
    dict(dp_shard=2, tp=2),
    dict(dp_shard=2, cp=2),
    dict(dp_shard=2, pp=2),
    dict(tp=2, cp=2),
    dict(tp=2, pp=2),
    dict(cp=2, pp=2),
    dict(dp_shard=4),
    dict(cp=4),
    dict(pp=4),
    dict(dp_shard=2, tp=2, pp=2),
]


def some_of(cases: list[Case], number: int, size: int, all_cases: bool) -> list[Case]:
    """On four processes and more another third for each layout: they take turns on two cores."""
    return cases if all_cases or size < 4 else cases[number % 3 :: 3]


def name_of(layout: dict[str, Any]) -> str:
    return "-".join(f"{axis}{size}" for axis, size in layout.items())


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_a_layout_equals_one_process(layout: dict[str, Any], all_cases: bool) -> None:
    size = math.prod(n for axis, n in layout.items() if axis in AXES)
    cases = some_of(CASES, LAYOUTS.index(layout), size, all_cases)
    results = on_ranks(size, on_layout, layout, size, cases)
    for number, case in enumerate(cases):
        compare(case, [result[number] for result in results])


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS, ids=name_of)
def test_experts_spread_over_processes_equal_one_process(
    layout: dict[str, Any], all_cases: bool
) -> None:
    """Balance and z losses included; those of the two models weigh enough to show."""
    size = math.prod(n for axis, n in layout.items() if axis in AXES)
    cases = [
        case
        for case in EXPERT_CASES
        if MODELS[case.model].num_experts % layout.get("ep", 1) == 0
        and not (case.model in ("switch", "jittered") and "cp" in layout)  # of whole sequences
    ]
    cases = some_of(cases, EXPERT_LAYOUTS.index(layout), size, all_cases)
    results = on_ranks(size, on_layout, layout, size, cases)
    for number, case in enumerate(cases):
        compare(case, [result[number] for result in results])


def compare(case: Case, results: list[Any]) -> None:
    wanted_history, wanted = on_one(case)
    exact = case.dtype == torch.float64
    found: dict[str, torch.Tensor] = {}
    for history, weights in results:
        for (loss, norm), (want_loss, want_norm) in zip(history, wanted_history, strict=True):
            assert loss == pytest.approx(want_loss, rel=1e-10 if exact else 1e-5), case
            assert norm == pytest.approx(want_norm, rel=1e-10 if exact else 1e-4), case
        found |= weights
    copied = found.pop(TIED_COPY, None)
    assert copied is None or torch.equal(copied, found["embed.weight"])
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        bound = 1e-10 if exact else 1e-4
        difference = (found[name] - weight).abs().max().item()
        assert difference <= bound, (case, name, difference)
