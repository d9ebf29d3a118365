"""Which process holds what: the sizes of the axes, a process's place in them, and their rules.

No torch: everything here follows from the configuration and the number of processes, so each one of
them finds the same fault before any of them waits for another.
"""

import math
from dataclasses import dataclass

from lascaux.config.check import no_effect
from lascaux.config.schema import Config, ModelConfig, ParallelConfig, TrainConfig
from lascaux.errors import ConfigError

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""outermost first: processes beside each other differ in tp, which talks most"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The size of every axis; their product is the number of processes."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    """experts spread over so many of the `weight_shards`; no axis of its own"""

    @property
    def sizes(self) -> tuple[int, ...]:
        """In the order of `AXES`."""
        return (self.pp, self.dp_replicate, self.dp_shard, self.cp, self.tp)

    @property
    def world_size(self) -> int:
        """Processes."""
        return math.prod(self.sizes)

    @property
    def data_parallel(self) -> int:
        """Groups of processes that see different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def weight_shards(self) -> int:
        """Processes that FSDP spreads one copy of the weights over: those of dp_shard and cp."""
        return self.dp_shard * self.cp

    def place(self, rank: int) -> dict[str, int]:
        """The index of a process on every axis."""
        found: dict[str, int] = {}
        for axis, size in reversed(list(zip(AXES, self.sizes, strict=True))):
            rank, found[axis] = divmod(rank, size)
        return found

    def data_rank(self, rank: int) -> int:
        """Which of the `data_parallel` groups a process belongs to."""
        place = self.place(rank)
        return place["dp_replicate"] * self.dp_shard + place["dp_shard"]

    def describe(self) -> str:
        """`dp_shard 2 x tp 2`, or `one process`."""
        parts = [f"{axis} {size}" for axis, size in zip(AXES, self.sizes, strict=True) if size > 1]
        text = " x ".join(parts) or "one process"
        return text if self.ep == 1 else f"{text} (ep {self.ep})"


def resolve_layout(config: Config, world_size: int) -> Layout:
    """The layout of a configuration on this many processes.

    Raises: ConfigError naming both sides of whatever does not fit, and what would.
    """
    parallel = config.parallel
    others = parallel.dp_replicate * parallel.tp * parallel.cp * parallel.pp
    asked = " x ".join(
        f"parallel.{axis} {getattr(parallel, axis)}"
        for axis in AXES
        if (getattr(parallel, axis) or 1) > 1
    )
    product = others * (parallel.dp_shard or 1)
    if parallel.dp_shard is None and world_size % others:
        raise ConfigError(
            f"{asked} needs a multiple of {others} processes, and there "
            f"{'is' if world_size == 1 else 'are'} {world_size}; start it with torchrun "
            f"--nproc-per-node {others} -m -- lascaux …"
        )
    if parallel.dp_shard is not None and product != world_size:
        raise ConfigError(
            f"{asked or 'the layout'} needs {product} processes, and there "
            f"{'is' if world_size == 1 else 'are'} {world_size}; start it with torchrun "
            f"--nproc-per-node {product} -m -- lascaux …, or leave parallel.dp_shard unset to use "
            "all of them"
        )
    layout = Layout(
        pp=parallel.pp,
        dp_replicate=parallel.dp_replicate,
        dp_shard=parallel.dp_shard or world_size // others,
        cp=parallel.cp,
        tp=parallel.tp,
        ep=parallel.ep,
    )
    check_layout(config, layout)
    return layout


def check_layout(config: Config, layout: Layout) -> None:
    """Raises: ConfigError for the first thing that the layout cannot split."""
    _check_settings(config.train, layout)
    check_split(config, layout)


def check_split(config: Config, layout: Layout) -> None:
    """The rules of the split alone, whatever code trains.

    Raises: ConfigError for the first thing that the layout cannot split.
    """
    _check_tensor(config.model, layout.tp)
    _check_experts(config.model, layout)
    _check_sequence(config, layout)
    _check_pipeline(config.model, config.parallel)
    _check_batch(config, layout)


def _check_settings(train: TrainConfig, layout: Layout) -> None:
    if layout.world_size == 1:
        return
    if train.precision == "fp16":
        raise ConfigError("'train.precision' fp16 is for one process; use bf16 with several")


def _check_tensor(model: ModelConfig, tp: int) -> None:
    _divides("parallel.tp", tp, "model.num_heads", model.num_heads)
    if model.kv_heads != model.num_heads:
        _divides("parallel.tp", tp, "model.num_kv_heads", model.kv_heads)
    _divides("parallel.tp", tp, "model.d_ff", model.ffn_width)
    if model.num_experts:
        key = "model.d_ff" if model.expert_d_ff is None else "model.expert_d_ff"
        _divides("parallel.tp", tp, key, model.expert_width)
    rows = "model.vocab_size" if model.padded_vocab_size is None else "model.padded_vocab_size"
    if model.vocab_rows % tp:
        raise ConfigError(
            f"parallel.tp {tp} does not divide {rows} {model.vocab_rows}; set "
            f"model.padded_vocab_size to {-(-model.vocab_rows // tp) * tp}"
        )
    if tp > 1 and model.qk_norm == "projection":
        raise ConfigError(
            "parallel.tp splits the projections that model.qk_norm = 'projection' normalises as a "
            "whole; use dp_shard, cp or pp, or model.qk_norm = 'head'"
        )


def _check_experts(model: ModelConfig, layout: Layout) -> None:
    if model.num_experts == 0:
        if layout.ep > 1:
            raise no_effect("parallel.ep", "with model.num_experts = 0")
        return
    _divides("parallel.ep", layout.ep, "model.num_experts", model.num_experts)
    keys = f"parallel.dp_shard {layout.dp_shard} x parallel.cp {layout.cp}"
    _divides("parallel.ep", layout.ep, f"{keys} =", layout.weight_shards)
    shards = layout.weight_shards // layout.ep
    if model.num_experts // layout.ep % shards and model.d_model % shards:
        raise ConfigError(
            f"{keys} / parallel.ep {layout.ep} = {shards} processes share the weights of experts, "
            f"and divide neither the {model.num_experts // layout.ep} experts of each nor "
            f"model.d_model {model.d_model}; choose another parallel.ep or dp_shard"
        )


def _check_sequence(config: Config, layout: Layout) -> None:
    if layout.cp > 1 and config.model.router_jitter:
        raise ConfigError(
            "model.router_jitter draws factors for a whole micro-batch, of which parallel.cp gives "
            "each process a part; use dp_shard, tp or pp, or --model.router_jitter=0"
        )
    if layout.cp > 1 and config.model.capacity_factor is not None:
        raise ConfigError(
            "model.capacity_factor drops tokens of a whole micro-batch, of which parallel.cp gives "
            "a process some; use dp_shard, tp or pp, or no capacity"
        )
    pieces = layout.tp * (2 * layout.cp if layout.cp > 1 else 1)
    seq_len = config.train.seq_len
    if seq_len % pieces:
        keys = f"parallel.tp {layout.tp} and 2 x parallel.cp {layout.cp}"
        if layout.cp == 1:
            keys = f"parallel.tp {layout.tp}"
        below = seq_len // pieces * pieces
        nearest = [n for n in (below, below + pieces) if 0 < n <= config.model.max_context]
        raise ConfigError(
            f"{keys} cut a sequence into {pieces} pieces, which does not divide train.seq_len "
            f"{seq_len}; nearest: {' or '.join(map(str, nearest))}"
        )


def _check_pipeline(model: ModelConfig, parallel: ParallelConfig) -> None:
    if parallel.pp == 1:
        for key, default in (("virtual_pp", 1), ("schedule", "1f1b")):
            if getattr(parallel, key) != default:
                raise no_effect(f"parallel.{key}", "with parallel.pp = 1")
        return
    if (parallel.schedule == "1f1b") != (parallel.virtual_pp == 1):
        raise ConfigError(
            f"parallel.schedule '{parallel.schedule}' and parallel.virtual_pp "
            f"{parallel.virtual_pp} do not go together: 1f1b takes 1, interleaved 2 or more"
        )
    stages = parallel.pp * parallel.virtual_pp
    if stages > model.num_layers:
        raise ConfigError(
            f"parallel.pp {parallel.pp} x parallel.virtual_pp {parallel.virtual_pp} = {stages} "
            f"stages are more than model.num_layers {model.num_layers}; at most "
            f"{model.num_layers // parallel.virtual_pp} pipeline processes"
        )


def _check_batch(config: Config, layout: Layout) -> None:
    train = config.train
    microbatches = train.batch_tokens // (train.microbatch_seqs * train.seq_len)
    if microbatches % layout.data_parallel:
        seqs = train.batch_tokens // train.seq_len
        fitting = [
            n for n in range(1, train.microbatch_seqs + 1) if not seqs % (n * layout.data_parallel)
        ]
        hint = f"train.microbatch_seqs {fitting[-1]}" if fitting else "a larger train.batch_tokens"
        raise ConfigError(
            f"parallel.dp_replicate {layout.dp_replicate} x parallel.dp_shard {layout.dp_shard} = "
            f"{layout.data_parallel} does not divide the {microbatches} micro-batches of a step "
            f"(train.batch_tokens {train.batch_tokens} / train.seq_len {train.seq_len} / "
            f"train.microbatch_seqs {train.microbatch_seqs}); try {hint}"
        )
    own = microbatches // layout.data_parallel
    if layout.pp > 1 and config.parallel.schedule != "1f1b" and own % layout.pp:
        raise ConfigError(
            f"parallel.schedule '{config.parallel.schedule}' needs the {own} micro-batches of each "
            f"data-parallel process to be a multiple of parallel.pp {layout.pp}; lower "
            "train.microbatch_seqs or raise train.batch_tokens"
        )
    if train.deterministic:
        _check_deterministic(layout, microbatches)


def _check_deterministic(layout: Layout, microbatches: int) -> None:
    if layout.tp * layout.cp * layout.pp * layout.ep > 1:
        raise ConfigError(
            "train.deterministic covers parallel.dp_replicate and parallel.dp_shard; tp, cp, pp "
            "and ep split the sums inside a layer, which rounds otherwise for each size"
        )
    if microbatches & (microbatches - 1):
        raise ConfigError(
            "train.deterministic adds micro-batches by a binary tree: their number, "
            f"{microbatches} (train.batch_tokens / train.seq_len / train.microbatch_seqs), must be "
            "a power of two"
        )


def _divides(key: str, degree: int, other: str, number: int) -> None:
    if number % degree:
        divisors = [d for d in range(1, number + 1) if number % d == 0]
        nearest = [d for d in divisors if d < degree][-1:] + [d for d in divisors if d > degree][:1]
        raise ConfigError(
            f"{key} {degree} does not divide {other} {number}; nearest: "
            f"{' or '.join(map(str, nearest))}"
        )
