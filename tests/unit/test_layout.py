"""What a layout refuses, before any process waits for another, and where processes stand."""

import dataclasses
import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from lascaux.config.schema import Config, ModelConfig, ParallelConfig, TrainConfig
from lascaux.errors import ConfigError, ProcessLost
from lascaux.parallel.layout import Layout, resolve_layout
from lascaux.parallel.plan import split_dim, stage_layers, tensor_plan
from lascaux.parallel.world import agree_on_prefix

MODEL = ModelConfig(num_layers=6, d_model=96, num_heads=6, num_kv_heads=2, vocab_size=512)
TRAIN = TrainConfig(steps=1, batch_tokens=16 * 256, microbatch_seqs=4, seq_len=256)


def resolve(world_size: int, model: dict[str, Any] | None = None, **settings: Any) -> Layout:
    train = {k.removeprefix("train_"): v for k, v in settings.items() if k.startswith("train_")}
    parallel = {k: v for k, v in settings.items() if not k.startswith("train_")}
    config = Config(
        model=dataclasses.replace(MODEL, **(model or {})),
        train=dataclasses.replace(TRAIN, **train),
        parallel=ParallelConfig(**parallel),
    )
    return resolve_layout(config, world_size)


@pytest.mark.parametrize(
    ("world_size", "settings", "message"),
    [
        (2, dict(dp_shard=4), "needs 4 processes, and there are 2"),
        (1, dict(dp_shard=1, tp=2), "parallel.tp 2 needs 2 processes, and there is 1"),
        (6, dict(tp=4), "parallel.tp 4 needs a multiple of 4 processes, and there are 6"),
        (4, dict(tp=4), "parallel.tp 4 does not divide model.num_heads 6; nearest: 3 or 6"),
        (3, dict(tp=3), "parallel.tp 3 does not divide model.num_kv_heads 2; nearest: 2"),
        (2, dict(tp=2, model=dict(vocab_size=511)), "set model.padded_vocab_size to 512"),
        (2, dict(tp=2, model=dict(qk_norm="projection")), "model.qk_norm = 'projection'"),
        (4, dict(cp=4, train_seq_len=252, train_batch_tokens=16 * 252), "nearest: 248 or 256"),
        (8, dict(pp=8), "8 stages are more than model.num_layers 6; at most 6"),
        (2, dict(pp=2, virtual_pp=2), "1f1b takes 1, interleaved 2 or more"),
        (1, dict(virtual_pp=2), "'parallel.virtual_pp' has no effect with parallel.pp = 1"),
        (8, dict(dp_shard=8), "does not divide the 4 micro-batches of a step"),
        (8, dict(dp_shard=8), "try train.microbatch_seqs 2"),
        (2, dict(tp=2, train_deterministic=True), "train.deterministic covers"),
    ],
)
def test_what_does_not_fit_is_said_with_what_would(
    world_size: int, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(world_size, **settings)
    assert message in str(caught.value)


def test_dp_shard_takes_the_processes_that_are_left() -> None:
    assert resolve(4, tp=2) == Layout(dp_shard=2, tp=2)
    assert resolve(1) == Layout()
    assert resolve(4, tp=2).describe() == "dp_shard 2 x tp 2"


def test_every_process_has_a_place_of_its_own() -> None:
    layout = Layout(pp=2, dp_replicate=3, dp_shard=2, cp=2, tp=4)
    places = [tuple(layout.place(rank).values()) for rank in range(layout.world_size)]
    assert len(set(places)) == layout.world_size == 96
    assert layout.place(1) == dict(tp=1, cp=0, dp_shard=0, dp_replicate=0, pp=0)
    ranks = [layout.data_rank(rank) for rank in range(layout.world_size)]
    assert sorted(set(ranks)) == list(range(6)) and ranks.count(0) == 16


def test_the_plan_splits_every_parameter() -> None:
    rows = tensor_plan(MODEL)
    assert split_dim(rows, "blocks.3.attn.q.weight", 2) == 0
    assert split_dim(rows, "blocks.3.attn.o.weight", 2) == 1
    assert split_dim(rows, "blocks.3.attn.o.bias", 1) is None
    assert split_dim(rows, "blocks.3.norm1.weight", 1) is None
    assert split_dim(rows, "embed.weight", 2) == split_dim(rows, "head_bias", 1) == 0
    with pytest.raises(AssertionError, match="how to split blocks.0.router.weight"):
        split_dim(rows, "blocks.0.router.weight", 2)


def test_stages_are_even_and_in_order() -> None:
    assert stage_layers(7, 3) == [range(3), range(3, 5), range(5, 7)]


def test_processes_started_again_agree_on_keys_never_used_before() -> None:
    """Each attempt finds what the last one left in the store, and some processes come late."""
    store = dist.HashStore()
    found: list[set[str]] = []
    for attempt in range(3):
        prefixes: dict[int, str] = {}

        def come(rank: int, attempt: int = attempt, prefixes: dict[int, str] = prefixes) -> None:
            time.sleep(0.05 * ((rank + attempt) % 3))
            prefixes[rank] = agree_on_prefix(store, rank, 3, 20)

        threads = [threading.Thread(target=come, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert prefixes.keys() == {0, 1, 2} and len(set(prefixes.values())) == 1
        found.append(set(prefixes.values()))
    assert len(set.union(*found)) == 3
    with pytest.raises(ProcessLost, match=r"ranks \[1, 2\] have not come"):
        agree_on_prefix(dist.HashStore(), 0, 3, 0.1)
    with pytest.raises(ProcessLost, match="the first process has not come"):
        agree_on_prefix(store, 1, 3, 0.1)
