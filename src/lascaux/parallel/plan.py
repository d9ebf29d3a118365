"""How the network is split over processes: one table, read beside `model/transformer.py`.

Tensor parallelism (Shoeybi et al. 2019) gives each of the tp processes some heads, feed-forward
columns and vocabulary rows. Between those the residual stream is split along the sequence, so that
norms and sums are done once (Korthikanti et al. 2022): `gather` brings a sequence together before
what needs all of it, `scatter` adds up the processes' parts and leaves each its piece. A parallel
block (GPT-J) has one of each, since attention and feed-forward read one norm and meet in one sum.

The other axes need no table: FSDP (dp_shard, cp) shards every parameter along its first dimension,
dp_replicate repeats that, cp gathers keys and values inside `attn.attend`, and pp gives a process
consecutive blocks. No torch here.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from lascaux.config.schema import ModelConfig

Weights = Literal["rows", "columns", "whole"]
"""rows: the output dimension of a matrix is split, or of each expert's; columns: the input
dimension; whole: every process has all of it"""
After = Literal["gather", "scatter"]

TIED_COPY = "embed.weight.copy"
"""the last pipeline stage's embedding, where the head is tied; checkpoints hold the first's"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What tensor parallelism does to the modules whose name matches."""

    pattern: str
    weights: Weights | None = None
    """how its own parameters are split; None: it has none"""
    after: After | None = None
    """what happens to its output"""


def tensor_plan(model: ModelConfig) -> tuple[Row, ...]:
    """The rows of a model; the first that matches a module counts."""
    one_sum = model.block != "sequential" and not model.sandwich_norm
    return (
        Row(pattern="embed", weights="rows", after="scatter"),
        Row(pattern="position_embed", weights="whole"),
        Row(pattern="embed_norm", weights="whole"),
        Row(pattern="blocks.*.norm?", weights="whole", after="gather"),
        Row(pattern="blocks.*.attn.[qkv]", weights="rows"),
        Row(pattern="blocks.*.attn.[qk]_norm", weights="whole"),
        Row(pattern="blocks.*.attn.o", weights="columns"),
        Row(pattern="blocks.*.ffn.gate", weights="rows"),
        Row(pattern="blocks.*.ffn.up", weights="rows"),
        Row(pattern="blocks.*.ffn.down", weights="columns"),
        Row(pattern="blocks.*.ffn.router", weights="whole"),
        Row(pattern="blocks.*.ffn.*.gate", weights="rows"),  # of experts, and of shared ones
        Row(pattern="blocks.*.ffn.*.up", weights="rows"),
        Row(pattern="blocks.*.ffn.*.down", weights="columns"),
        Row(pattern="blocks.*.join", after="scatter" if one_sum else None),
        Row(pattern="blocks.*.attn", after=None if one_sum else "scatter"),
        Row(pattern="blocks.*.ffn", after=None if one_sum else "scatter"),
        Row(pattern="blocks.*.*_out_norm", weights="whole"),
        Row(pattern="final_norm", weights="whole", after="gather"),
        Row(pattern="head", weights="rows"),
        Row(pattern="", weights="rows"),  # the bias of a tied head
    )


def find_row(rows: tuple[Row, ...], name: str) -> Row | None:
    """The row of a module."""
    return next((row for row in rows if fnmatchcase(name, row.pattern)), None)


def split_dim(rows: tuple[Row, ...], parameter: str, num_dims: int) -> int | None:
    """The dimension along which tp splits a parameter, or None where all have the whole of it."""
    module, _, _ = parameter.rpartition(".")
    row = find_row(rows, module)
    if row is None or row.weights is None:
        raise AssertionError(f"no row of the plan says how to split {parameter}")
    if row.weights == "whole" or (row.weights == "columns" and num_dims == 1):
        return None
    return max(0, num_dims - 2) if row.weights == "rows" else num_dims - 1


def stage_layers(num_layers: int, num_stages: int) -> list[range]:
    """The blocks of each pipeline stage, as even as they come; the earlier ones have one more."""
    size, more = divmod(num_layers, num_stages)
    starts = [stage * size + min(stage, more) for stage in range(num_stages + 1)]
    return [range(a, b) for a, b in zip(starts, starts[1:], strict=False)]


def stages_of(pp_index: int, pp: int, virtual_pp: int) -> list[int]:
    """The stages of one pipeline process: every pp-th."""
    return [pp_index + pp * turn for turn in range(virtual_pp)]
