"""Seconds of a step: properties that any such model has to have, and figures worked out by hand."""

import dataclasses

import pytest

from lascaux.config.load import load_config
from lascaux.config.schema import Config
from lascaux.parallel.layout import Layout
from lascaux.planner.devices import find_device
from lascaux.planner.job import Job, make_job
from lascaux.planner.runs import find_run, flops_counted
from lascaux.planner.work import Constants, device_parameters, step_seconds

A100 = find_device("A100-80GB-SXM")
CONSTANTS = Constants()


def job(config: Config, layout: Layout) -> Job:
    parallel = dataclasses.replace(config.parallel, pp=layout.pp)
    return make_job(dataclasses.replace(config, parallel=parallel), A100, layout, "bf16")


@pytest.fixture
def config() -> Config:
    flags = ["--model.vocab_size=50304", "--train.microbatch_seqs=1", "--plan.stack=unknown"]
    return load_config("gpt3-13b", flags)


def test_products_take_the_work_over_the_rate(config: Config) -> None:
    """6 N of matrix products and the halved 12 L d T of a fused kernel, at the reachable rate."""
    seconds = step_seconds(job(config, Layout(dp_shard=8)), Constants(tile_penalty=0.0))
    rate = 8 * CONSTANTS.product_share * 271.2e12
    model, tokens = config.model, config.train.batch_tokens
    body = 12 * model.num_layers * model.d_model**2 + 50304 * model.d_model
    core = 0.5 * 1.5 * 12 * model.num_layers * model.d_model * 2048
    assert seconds.products == pytest.approx(tokens * (6 * body + core) / rate, rel=0.2)
    assert seconds.products > tokens * (6 * body + core) / rate  # memory has to move, too


def test_the_bubble_is_p_minus_one_over_the_micro_batches(config: Config) -> None:
    """Narayanan et al. 2021, section 2.2; without what crosses the boundaries."""
    fast = dataclasses.replace(A100, network_bytes_per_second=1e15, link_bytes_per_second=1e15)
    staged = dataclasses.replace(job(config, Layout(pp=8, dp_shard=8)), device=fast)
    seconds = step_seconds(staged, CONSTANTS)
    microbatches = config.train.batch_tokens // 2048 // 8
    busy = seconds.products + seconds.memory_traffic + seconds.launches
    assert seconds.pipeline_bubble / busy == pytest.approx(7 / microbatches, rel=0.05)


def test_interleaving_shrinks_the_bubble() -> None:
    full = find_run("korthikanti-2022-530b-time-full").job
    assert full is not None and full.config.parallel.virtual_pp == 3
    parallel = dataclasses.replace(full.config.parallel, virtual_pp=1, schedule="1f1b")
    plain = dataclasses.replace(full, config=dataclasses.replace(full.config, parallel=parallel))
    fast = dataclasses.replace(
        full.device, network_bytes_per_second=1e15, link_bytes_per_second=1e15
    )
    bubbles = [
        step_seconds(dataclasses.replace(each, device=fast), CONSTANTS).pipeline_bubble
        for each in (full, plain)
    ]
    assert bubbles[0] == pytest.approx(bubbles[1] / 3, rel=0.1)


def test_sharded_weights_that_travel_longer_than_they_are_used_bound_the_step() -> None:
    """ZeRO-3 at one sequence a device: 3 x 2 bytes of 175 B parameters through 21 GB/s, 49 s.

    Narayanan et al. 2021, table 2, measured 44 TFLOP/s, which is 67 s.
    """
    found = find_run("narayanan-2021-t2-zero3-175b-1536-gpus").job
    assert found is not None
    shares = Constants(link_share=0.85, networks_share=0.0)  # one card each, as that code did
    seconds = step_seconds(found, shares)
    by_hand = 3 * 2 * 174.6e9 / (0.85 * 25e9)
    compute = seconds.products + seconds.memory_traffic
    assert seconds.data_parallel == pytest.approx(
        by_hand - compute + shares.gather_share * compute, rel=0.02
    )
    tokens = found.config.train.batch_tokens
    counted = flops_counted(find_run("narayanan-2021-t2-zero3-175b-1536-gpus"))
    assert counted is not None
    measured = counted * tokens / 1536 / 44e12
    assert seconds.total == pytest.approx(measured, rel=0.25)


def test_every_part_is_counted_once_and_none_is_negative(config: Config) -> None:
    for layout in (Layout(), Layout(tp=8), Layout(pp=4, tp=2), Layout(dp_replicate=4, tp=2)):
        seconds = step_seconds(job(config, layout), CONSTANTS)
        parts = dataclasses.asdict(seconds)
        assert min(parts.values()) >= 0
        assert seconds.total == pytest.approx(sum(parts.values()))


def test_recomputing_a_block_adds_a_third_of_its_work(config: Config) -> None:
    train = dataclasses.replace(config.train, recompute="block")
    again = dataclasses.replace(config, train=train)
    plain, full = (
        step_seconds(job(each, Layout(dp_shard=8)), CONSTANTS).products for each in (config, again)
    )
    head = 6 * 50304 * config.model.d_model * config.train.batch_tokens
    head /= 8 * CONSTANTS.product_share * 271.2e12
    assert full - plain == pytest.approx((plain - head) / 3, rel=0.02)


def test_a_mixture_works_as_much_as_its_active_experts(config: Config) -> None:
    """Eight experts of half the width, two a token: the work of the dense layer."""
    flags = ["--model.ffn_bias=false", "--model.num_experts=8", "--model.expert_d_ff=10240"]
    mixture = load_config("gpt3-13b", [*flags, "--model.vocab_size=50304", *PLAIN])
    dense, mixed = (
        step_seconds(job(each, Layout(dp_shard=8)), CONSTANTS).products
        for each in (config, mixture)
    )
    assert 1.0 < mixed / dense < 1.5  # the same work, and more weights to read
    assert device_parameters(job(mixture, Layout())) > 2.5 * device_parameters(
        job(config, Layout())
    )


PLAIN = ("--train.microbatch_seqs=1", "--plan.stack=unknown")
