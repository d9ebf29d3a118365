"""A run as the planner sees it: a configuration on devices, and what other code does otherwise.

By default the job is what `lascaux train` does with the configuration. `plan.stack`, `plan.zero`,
`plan.recompute`, `plan.attention` and `plan.sequence_parallel` state a run of other code.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from lascaux.config.check import num_steps
from lascaux.config.schema import Config, ModelConfig
from lascaux.errors import ConfigError
from lascaux.parallel.layout import Layout, check_layout, check_split
from lascaux.planner.devices import Device

Recompute = Literal["none", "selective", "full"]
VOCABULARY_MULTIPLE = 128
PRECISION_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A configuration on devices."""

    config: Config
    layout: Layout
    device: Device
    stack: str
    precision: str
    recompute: Recompute
    zero: int
    """what data parallelism shards: 0 nothing, 1 optimizer, 2 and gradients, 3 and weights"""
    sequence_parallel: bool
    fused_attention: bool

    @property
    def devices(self) -> int:
        """All of them."""
        return self.layout.world_size

    @property
    def element_bytes(self) -> int:
        """Bytes of a number in the network's products and activations."""
        return PRECISION_BYTES[self.precision]

    @property
    def microbatch_tokens(self) -> int:
        """Tokens of one forward pass on one pipeline, a context-parallel process having a part."""
        train = self.config.train
        return train.microbatch_seqs * train.seq_len // self.layout.cp

    @property
    def num_microbatches(self) -> int:
        """Forward passes of each data-parallel process in a step."""
        train = self.config.train
        seqs = train.batch_tokens // train.seq_len
        return max(1, seqs // (train.microbatch_seqs * self.layout.data_parallel))

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return num_steps(self.config.train)

    @property
    def tokens(self) -> int:
        """Tokens of the run."""
        return self.num_steps * self.config.train.batch_tokens

    @property
    def weight_shards(self) -> int:
        """Devices that share one copy of the weights beside tp and pp."""
        return self.layout.weight_shards if self.zero == 3 else 1

    @property
    def optimizer_shards(self) -> int:
        """Devices that share one optimizer state beside tp and pp."""
        if self.zero == 0:
            return 1
        return self.weight_shards if self.zero == 3 else self.layout.weight_shards


def make_job(config: Config, device: Device, layout: Layout, precision: str) -> Job:
    """The job of a configuration on a layout.

    Raises: ConfigError naming the rule that the layout breaks.
    """
    config = as_trained(config)
    if config.plan.stack != "lascaux":
        config = replace(config, model=padded(config.model, layout.tp))
    plan = config.plan
    if plan.stack == "lascaux":
        check_layout(config, layout)
    else:
        check_split(config, layout)
    if precision not in PRECISION_BYTES:
        raise ConfigError(f"cannot plan for precision '{precision}'; use fp32, bf16 or fp16")
    recompute: Recompute = "full" if config.train.recompute == "block" else "none"
    if plan.recompute != "as_trained":
        recompute = plan.recompute
    zero = plan.zero if plan.zero is not None else (3 if layout.weight_shards > 1 else 0)
    return Job(
        config=config,
        layout=with_stage(layout, zero) if plan.zero is not None else layout,
        device=device,
        stack=plan.stack,
        precision=precision,
        recompute=recompute,
        zero=zero,
        sequence_parallel=sequence_parallel(config, recompute),
        fused_attention=fused_attention(config, recompute, layout),
    )


def padded(model: ModelConfig, tp: int) -> ModelConfig:
    """The model with a vocabulary that tp divides, filled up as `padded_vocab_size` does it."""
    if model.vocab_rows % tp == 0:
        return model
    multiple = tp * VOCABULARY_MULTIPLE // math.gcd(tp, VOCABULARY_MULTIPLE)
    return replace(model, padded_vocab_size=-(-model.vocab_rows // multiple) * multiple)


def as_trained(config: Config) -> Config:
    """The configuration with what `plan` says of recomputation, and a stack that can do it all.

    A ZeRO stage, selective recomputation, attention that keeps its matrices and tensor parallelism
    without sequence parallelism are other code's, whose stack is unknown unless it is named.
    """
    plan, train = config.plan, config.train
    if plan.stack != "lascaux":
        return config
    foreign = plan.zero is not None or plan.recompute == "selective"
    if foreign or plan.attention == "unfused" or plan.sequence_parallel is False:
        return replace(config, plan=replace(plan, stack="unknown"))
    if plan.recompute != "as_trained":
        train = replace(train, recompute="block" if plan.recompute == "full" else "none")
    return replace(config, train=train)


def sequence_parallel(config: Config, recompute: Recompute) -> bool:
    """As stated; Megatron's came with selective recomputation in place of that of whole blocks.

    Korthikanti et al. 2022.
    """
    stated = config.plan.sequence_parallel
    if stated is not None:
        return stated
    return config.plan.stack == "lascaux" or recompute != "full"


def fused_attention(config: Config, recompute: Recompute, layout: Layout) -> bool:
    """As stated; recomputing attention has no purpose where its matrices are never kept.

    Tensor parallel code that recomputed whole blocks is mostly older than fused kernels.
    """
    stated = config.plan.attention
    if stated is not None:
        return stated == "fused"
    old = recompute == "selective" or (recompute == "full" and layout.tp > 1)
    return config.plan.stack == "lascaux" or not old


def with_stage(layout: Layout, zero: int) -> Layout:
    """The layout with all data parallelism in one axis: what a ZeRO stage of other code spreads."""
    return Layout(
        pp=layout.pp,
        dp_replicate=layout.data_parallel if zero == 0 else 1,
        dp_shard=layout.data_parallel if zero > 0 else 1,
        cp=layout.cp,
        tp=layout.tp,
        ep=layout.ep,
    )
