"""A small copy of a configuration: every switch as it is, every size as small as its layout allows.

What a layout must divide stays divided, and what does not come out even stays so: heads over tp,
layers over stages, padded rows of the vocabulary, a width that the heads do not fill.
"""

import dataclasses

from lascaux.config.check import check
from lascaux.config.schema import Config, ModelConfig, ParallelConfig
from lascaux.parallel.layout import AXES, Layout

MOST_PROCESSES = 16
HEAD_WIDTH, TOKENS, VOCABULARY, MOST_EXPERTS = 16, 16, 96, 8


def shrink(config: Config, layout: Layout) -> tuple[Config, Layout]:
    """The copy and its layout, which `config` must fit.

    With more processes than `MOST_PROCESSES` every axis that is split is split in two.
    """
    small = layout
    if layout.world_size > MOST_PROCESSES:
        sizes = {axis: min(2, getattr(layout, axis)) for axis in AXES}
        ep = min(layout.ep, sizes["dp_shard"] * sizes["cp"])
        small = Layout(**sizes, ep=ep)
    parallel = dataclasses.replace(
        config.parallel,
        **{axis: getattr(small, axis) for axis in AXES},
        ep=small.ep,
        virtual_pp=min(2, config.parallel.virtual_pp),
    )
    seq_len = _multiple(TOKENS, small.tp * (2 * small.cp if small.cp > 1 else 1))
    seqs = min(2, config.train.microbatch_seqs)
    microbatches = small.data_parallel * 2 * small.pp
    train = dataclasses.replace(
        config.train,
        steps=1,
        tokens=None,
        batch_tokens=microbatches * seqs * seq_len,
        microbatch_seqs=seqs,
        seq_len=seq_len,
        precision="bf16" if config.train.precision == "bf16" else "fp32",
        tracking="none",
    )
    copy = dataclasses.replace(
        config,
        model=_shrink_model(config.model, parallel, seq_len),
        train=train,
        parallel=parallel,
        schedule=dataclasses.replace(config.schedule, warmup_steps=0),
    )
    check(copy)
    return copy, small


def _shrink_model(model: ModelConfig, parallel: ParallelConfig, seq_len: int) -> ModelConfig:
    stages, tp = parallel.pp * parallel.virtual_pp, parallel.tp
    group = model.num_heads // model.kv_heads
    kv_heads = min(_multiple(2, tp), model.kv_heads)
    head_width = min(HEAD_WIDTH, model.head_width)
    d_model = kv_heads * group * head_width
    if model.attention_width != model.d_model:
        d_model += HEAD_WIDTH
    d_ff = None
    if model.d_ff is not None:
        d_ff = _multiple(d_model * model.ffn_width // model.d_model, tp)
    rotary_dims = None
    if model.rotary_dims is not None:
        rotary_dims = max(2, model.rotary_dims * head_width // model.head_width // 2 * 2)
    expert_d_ff = None
    if model.expert_d_ff is not None:
        expert_d_ff = _multiple(max(8, d_model * model.expert_d_ff // model.d_model // 8 * 8), tp)
    num_experts = min(_multiple(MOST_EXPERTS, parallel.ep), model.num_experts)
    rows = _multiple(VOCABULARY, tp)
    padded = model.padded_vocab_size is not None
    layers = 1 + model.moe_every if model.num_experts else 2
    uneven = bool(model.num_layers % stages)
    return dataclasses.replace(
        model,
        num_layers=min(model.num_layers, max(layers, stages) + uneven),
        d_model=d_model,
        num_heads=kv_heads * group,
        num_kv_heads=None if model.num_kv_heads is None else kv_heads,
        head_dim=None if model.head_dim is None else head_width,
        d_ff=d_ff,
        expert_d_ff=expert_d_ff,
        num_experts=num_experts,
        experts_per_token=min(model.experts_per_token, max(2, num_experts // 2)),
        num_dense_layers=min(1, model.num_dense_layers),
        rotary_dims=rotary_dims,
        vocab_size=rows - 3 * padded,
        padded_vocab_size=rows if padded else None,
        max_context=seq_len,
    )


def _multiple(at_least: int, of: int) -> int:
    return -(-at_least // of) * of
