"""Families of Hugging Face models, a table each: their config.json, their tensors, and ours.

Names and defaults are those that transformers 5 reads and writes on disk; older spellings are read
too, and written where older versions need them. How a table is read: `choose.py`, `rows.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lascaux.exchange.rows import Names, each, same

ALL_BIASES = dict(attention_bias=True, attention_output_bias=True, ffn_bias=True, norm_bias=True)
Entries = Mapping[str, tuple[str, Any]]
"""ours, several words for one of theirs -> its spellings, the one we write first; its default, None
where it must be there or follows from others"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One model_type."""

    name: str
    architecture: str
    settings: Entries
    fixed: Mapping[str, Any]
    """settings of ours that every model of the family has"""
    demanded: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """settings of theirs for which our network knows one value, or one unless null"""
    scaling: str = "rope_type type"
    """setting of theirs that says how rotary wavelengths are stretched, in several spellings"""
    prefix: str
    """of tensors; files of old versions leave it out"""
    ends: Names
    """tensors outside the layers"""
    layer: str
    """prefix of a layer's tensors"""
    block: Names
    """tensors inside a layer"""


SMALL_SPELLING: Entries = {
    "num_layers": ("n_layer num_hidden_layers", None),
    "d_model": ("n_embd hidden_size", None),
    "num_heads": ("n_head num_attention_heads", None),
    "max_context": ("n_positions n_ctx max_position_embeddings", None),
    "d_ff": ("n_inner", None),
    "activation": ("activation_function", "gelu_new"),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
}
LONG_SPELLING: Entries = {
    "num_layers": ("num_hidden_layers", None),
    "d_model": ("hidden_size", None),
    "num_heads": ("num_attention_heads", None),
    "max_context": ("max_position_embeddings", None),
}
TIED: Entries = {"tie_embeddings": ("tie_word_embeddings", True)}
OWN_HEAD: Entries = {"tie_embeddings": ("tie_word_embeddings", False)}

GPTJ = Family(
    name="gptj",
    architecture="GPTJForCausalLM",
    settings=SMALL_SPELLING | {"rotary_dims": ("rotary_dim", None)},
    fixed=dict(
        block="parallel",
        rotary_layout="interleaved",
        ffn_bias=True,
        norm_bias=True,
        tie_embeddings=False,
        head_bias=True,
    ),
    demanded={"tie_word_embeddings": False},
    prefix="transformer.",
    ends=same(embed="transformer.wte", final_norm="transformer.ln_f", head="lm_head"),
    layer="transformer.h.{}.",
    block=each("q k v", "attn.{part}", "attn.{part}_proj")
    + same(norm1="ln_1", attn_o="attn.out_proj", ffn_up="mlp.fc_in", ffn_down="mlp.fc_out"),
)

LEARNED_ENDS = same(
    embed="transformer.wte",
    position_embed="transformer.wpe",
    final_norm="transformer.ln_f",
    head="lm_head",
)
GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    settings=SMALL_SPELLING | TIED,
    fixed=dict(position="learned") | ALL_BIASES,
    demanded={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    prefix="transformer.",
    ends=LEARNED_ENDS,
    layer="transformer.h.{}.",
    block=(
        *same(norm1="ln_1", norm2="ln_2"),
        ("attn.q attn.k attn.v", "attn.c_attn", "thirds"),
        ("attn.o", "attn.c_proj", "transposed"),
        ("ffn.up", "mlp.c_fc", "transposed"),
        ("ffn.down", "mlp.c_proj", "transposed"),
    ),
)

GPT_NEO = Family(
    name="gpt_neo",
    architecture="GPTNeoForCausalLM",
    settings=LONG_SPELLING
    | TIED
    | {
        "num_layers": ("num_layers num_hidden_layers", None),
        "num_heads": ("num_heads num_attention_heads", None),
        "d_ff": ("intermediate_size", None),
        "activation": ("activation_function", "gelu_new"),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
    },
    fixed=dict(position="learned") | ALL_BIASES | dict(attention_bias=False),
    prefix="transformer.",
    ends=LEARNED_ENDS,
    layer="transformer.h.{}.",
    block=(
        *same(norm1="ln_1", norm2="ln_2", attn_o="attn.attention.out_proj"),
        *same(ffn_up="mlp.c_fc", ffn_down="mlp.c_proj"),
        *each("k v", "attn.{part}", "attn.attention.{part}_proj"),
        ("attn.q", "attn.attention.q_proj", "unscaled"),
    ),
)

FUSED_BLOCK: Names = same(
    norm1="input_layernorm",
    norm2="post_attention_layernorm",
    ffn_up="mlp.dense_h_to_4h",
    ffn_down="mlp.dense_4h_to_h",
)
GPT_NEOX = Family(
    name="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    settings=LONG_SPELLING
    | OWN_HEAD
    | {
        "d_ff": ("intermediate_size", None),
        "block": ("use_parallel_residual", True),
        "rotary_dims": ("rotary_pct partial_rotary_factor", 0.25),
        "rotary_base": ("rotary_emb_base rope_theta", 10000.0),
        "activation": ("hidden_act", "gelu"),
        "norm_eps": ("layer_norm_eps", 1e-5),
        "attention_bias attention_output_bias": ("attention_bias", True),
    },
    fixed=dict(ffn_bias=True, norm_bias=True),
    prefix="gpt_neox.",
    ends=same(embed="gpt_neox.embed_in", final_norm="gpt_neox.final_layer_norm", head="embed_out"),
    layer="gpt_neox.layers.{}.",
    block=(
        ("attn.q attn.k attn.v", "attention.query_key_value", "heads"),
        *same(attn_o="attention.dense"),
        *FUSED_BLOCK,
    ),
)

OPT = Family(
    name="opt",
    architecture="OPTForCausalLM",
    settings=LONG_SPELLING
    | TIED
    | {
        "d_ff": ("ffn_dim", None),
        "activation": ("activation_function", "relu"),
        "ffn_bias attention_bias attention_output_bias": ("enable_bias", True),
    },
    fixed=dict(position="learned", learned_position_offset=2, norm_bias=True, norm_eps=1e-5),
    demanded={
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "layer_norm_elementwise_affine": True,
    },
    prefix="model.",
    ends=same(
        embed="model.decoder.embed_tokens",
        position_embed="model.decoder.embed_positions",
        final_norm="model.decoder.final_layer_norm",
        head="lm_head",
    ),
    layer="model.decoder.layers.{}.",
    block=each("q k v", "attn.{part}", "self_attn.{part}_proj")
    + same(norm1="self_attn_layer_norm", norm2="final_layer_norm")
    + same(attn_o="self_attn.out_proj", ffn_up="fc1", ffn_down="fc2"),
)

BLOOM = Family(
    name="bloom",
    architecture="BloomForCausalLM",
    settings=TIED
    | {
        "num_layers": ("n_layer num_hidden_layers", None),
        "d_model": ("hidden_size n_embed", None),
        "num_heads": ("n_head num_attention_heads", None),
        "max_context": ("seq_length", 2048),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
    },
    fixed=dict(position="alibi", embedding_norm=True) | ALL_BIASES,
    demanded={"apply_residual_connection_post_layernorm": False},
    prefix="transformer.",
    ends=same(
        embed="transformer.word_embeddings",
        embed_norm="transformer.word_embeddings_layernorm",
        final_norm="transformer.ln_f",
        head="lm_head",
    ),
    layer="transformer.h.{}.",
    block=(
        ("attn.q attn.k attn.v", "self_attention.query_key_value", "heads"),
        *same(attn_o="self_attention.dense"),
        *FUSED_BLOCK,
    ),
)

LLAMA_SETTINGS: Entries = (
    LONG_SPELLING
    | OWN_HEAD
    | {
        "num_kv_heads": ("num_key_value_heads", None),
        "head_dim": ("head_dim", None),
        "d_ff": ("intermediate_size", None),
        "rotary_base": ("rope_theta", 10000.0),
        "activation": ("hidden_act", "silu"),
        "norm_eps": ("rms_norm_eps", 1e-6),
    }
)
LLAMA_ENDS = same(embed="model.embed_tokens", final_norm="model.norm", head="lm_head")
LLAMA_ATTENTION = each("q k v o", "attn.{part}", "self_attn.{part}_proj") + same(
    norm1="input_layernorm", norm2="post_attention_layernorm"
)
LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    settings=LLAMA_SETTINGS
    | {
        "attention_bias attention_output_bias": ("attention_bias", False),
        "ffn_bias": ("mlp_bias", False),
    },
    fixed=dict(norm="rmsnorm"),
    demanded={"partial_rotary_factor": 1.0},
    prefix="model.",
    ends=LLAMA_ENDS,
    layer="model.layers.{}.",
    block=LLAMA_ATTENTION + each("gate up down", "ffn.{part}", "mlp.{part}_proj"),
)

MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    settings=LLAMA_SETTINGS
    | {
        "norm_eps": ("rms_norm_eps", 1e-5),
        "rotary_base": ("rope_theta", 1e6),
        "num_experts": ("num_local_experts num_experts", 8),
        "experts_per_token": ("num_experts_per_tok", 2),
    },
    fixed=dict(norm="rmsnorm", router_normalize=True),
    demanded={"partial_rotary_factor": 1.0},
    prefix="model.",
    ends=LLAMA_ENDS,
    layer="model.layers.{}.",
    block=(
        *LLAMA_ATTENTION,
        ("ffn.router", "block_sparse_moe.gate", "same"),
        ("ffn.experts.gate", "block_sparse_moe.experts.{}.w1", "stacked"),
        ("ffn.experts.up", "block_sparse_moe.experts.{}.w3", "stacked"),
        ("ffn.experts.down", "block_sparse_moe.experts.{}.w2", "stacked"),
    ),
)

OLMOE = Family(
    name="olmoe",
    architecture="OlmoeForCausalLM",
    settings={key: value for key, value in LLAMA_SETTINGS.items() if key != "head_dim"}
    | {
        "norm_eps": ("rms_norm_eps", 1e-5),
        "num_experts": ("num_experts num_local_experts", 64),
        "experts_per_token": ("num_experts_per_tok", 8),
        "router_normalize": ("norm_topk_prob", False),
        "attention_bias attention_output_bias": ("attention_bias", False),
    },
    fixed=dict(norm="rmsnorm", qk_norm="projection"),
    demanded={"partial_rotary_factor": 1.0, "clip_qkv": None},
    prefix="model.",
    ends=LLAMA_ENDS,
    layer="model.layers.{}.",
    block=(
        *LLAMA_ATTENTION,
        *each("q_norm k_norm", "attn.{part}", "self_attn.{part}"),
        ("ffn.router", "mlp.gate", "same"),
        *each("gate up down", "ffn.experts.{part}", "mlp.experts.{}.{part}_proj", "stacked"),
    ),
)

FAMILIES = {
    family.name: family
    for family in (GPTJ, GPT2, GPT_NEO, GPT_NEOX, OPT, BLOOM, LLAMA, MIXTRAL, OLMOE)
}
"""In this order they are tried for an export"""
