"""Layouts, micro-batches and recomputation of a model on devices, those that fit ranked.

Every combination that `parallel.layout` allows is priced with the same ledger and the same seconds
as the plan itself; nothing is tried out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from lascaux.config.schema import Config, ParallelConfig
from lascaux.errors import ConfigError
from lascaux.parallel.layout import Layout
from lascaux.planner.devices import Device
from lascaux.planner.job import Job, make_job, padded
from lascaux.planner.memory import Ledger, worst_ledger
from lascaux.planner.work import Constants, StepSeconds, step_seconds

FITS = 0.98
"""least probability with which a layout has to fit"""
MOST_MICROBATCH_TOKENS = 65_536
MOST_TENSOR_PARALLEL = 8
LONG_SEQUENCE = 16_384


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A layout with what it takes."""

    job: Job
    ledger: Ledger
    seconds: StepSeconds
    fits_probability: float


def search(
    config: Config,
    device: Device,
    devices: int,
    precision: str,
    constants: Constants,
    fits: Callable[[Job, Ledger], float],
    batch_tolerance: float = 0.0,
) -> list[Candidate]:
    """Every layout that fits with probability `FITS`, the fastest first.

    Of layouts that differ in the micro-batch or in recomputation alone the fastest is kept.
    """
    best: dict[Layout, Candidate] = {}
    for layout in layouts(config, device, devices):
        for job in jobs_on(config, device, layout, precision, batch_tolerance):
            _, ledger = worst_ledger(job)
            if ledger.total > device.memory_bytes:
                continue
            probability = fits(job, ledger)
            if probability < FITS:
                continue
            found = Candidate(
                job=job,
                ledger=ledger,
                seconds=step_seconds(job, constants),
                fits_probability=probability,
            )
            known = best.get(layout)
            if known is None or seconds_per_token(found) < seconds_per_token(known):
                best[layout] = found
    return sorted(best.values(), key=seconds_per_token)


def seconds_per_token(candidate: Candidate) -> float:
    """What layouts are ranked by: batches may differ where they were rounded."""
    return candidate.seconds.total / candidate.job.config.train.batch_tokens


def layouts(config: Config, device: Device, devices: int) -> Iterator[Layout]:
    """Sizes of the axes whose product is the number of devices."""
    model = config.model
    largest_tp = min(MOST_TENSOR_PARALLEL, device.devices_per_node, devices)
    contexts = [1] if config.train.seq_len < LONG_SEQUENCE else [1, 2, 4, 8]
    for tp in divisors(devices, largest_tp):
        for pp in divisors(devices // tp, min(model.num_layers, 64)):
            for cp in contexts:
                if devices % (tp * pp * cp):
                    continue
                data_parallel = devices // (tp * pp * cp)
                for shard in _shards(config, device, tp, data_parallel):
                    for ep in _expert_sizes(model.num_experts, shard * cp):
                        yield Layout(
                            tp=tp,
                            pp=pp,
                            cp=cp,
                            ep=ep,
                            dp_shard=shard,
                            dp_replicate=data_parallel // shard,
                        )


def jobs_on(
    config: Config, device: Device, layout: Layout, precision: str, batch_tolerance: float = 0.0
) -> Iterator[Job]:
    """Micro-batches and recomputation on one layout, as far as its rules allow.

    A vocabulary that tp does not divide is filled up; a batch that does not divide over data
    parallelism is rounded within `batch_tolerance`, a fraction of it.
    """
    train, seq_len = config.train, config.train.seq_len
    model, asked = padded(config.model, layout.tp), train.batch_tokens // seq_len
    for microbatch in _powers_of_two(max(1, MOST_MICROBATCH_TOKENS // seq_len)):
        whole = microbatch * layout.data_parallel
        seqs = max(1, round(asked / whole)) * whole
        if abs(seqs - asked) > batch_tolerance * asked:
            break
        stated = config.plan.recompute != "as_trained"
        for recompute in (train.recompute,) if stated else ("none", "block"):
            changed = replace(
                config,
                model=model,
                train=replace(
                    train,
                    microbatch_seqs=microbatch,
                    recompute=recompute,
                    batch_tokens=seqs * seq_len,
                ),
                parallel=parallel_settings(config, layout),
            )
            try:
                yield make_job(changed, device, layout, precision)
            except ConfigError:
                break  # what forbids this forbids a larger micro-batch too


def first_refusal(config: Config, device: Device, devices: int, precision: str) -> str | None:
    """Why no layout is possible; None where one is, whether it fits or not."""
    refusal = None
    for layout in layouts(config, device, devices):
        train = replace(config.train, microbatch_seqs=1)
        parallel = parallel_settings(config, layout)
        try:
            make_job(replace(config, train=train, parallel=parallel), device, layout, precision)
        except ConfigError as error:
            refusal = refusal or str(error)
        else:
            return None
    return refusal


def parallel_settings(config: Config, layout: Layout) -> ParallelConfig:
    """The section `parallel` of a configuration on this layout."""
    return replace(
        config.parallel,
        tp=layout.tp,
        pp=layout.pp,
        cp=layout.cp,
        ep=layout.ep,
        dp_shard=layout.dp_shard,
        dp_replicate=layout.dp_replicate,
        virtual_pp=1,
        schedule="1f1b",
    )


def _shards(config: Config, device: Device, tp: int, data_parallel: int) -> list[int]:
    """Sizes of dp_shard: none, a node's, all; where a ZeRO stage is stated it speaks of all."""
    if config.plan.zero is not None:
        return [data_parallel]
    return sorted({1, _node_share(device, tp, data_parallel), data_parallel})


def _node_share(device: Device, tp: int, data_parallel: int) -> int:
    """Data-parallel processes of one node: shards stay inside it, copies go between nodes."""
    share = max(1, device.devices_per_node // tp)
    return share if data_parallel % share == 0 else 1


def _expert_sizes(num_experts: int, weight_shards: int) -> list[int]:
    if not num_experts:
        return [1]
    sizes = [n for n in _powers_of_two(weight_shards) if num_experts % n == weight_shards % n == 0]
    return sizes or [1]


def _powers_of_two(most: int) -> list[int]:
    return [1 << k for k in range(most.bit_length()) if 1 << k <= most]


def divisors(number: int, most: int) -> list[int]:
    """All divisors up to `most`."""
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]
