"""Tiny random models of eight families: transformers' own, our shape for it, and how names map.

Each `to_ours` rearranges a dict of the other side's tensors, weights and gradients alike.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from lascaux.config.schema import ModelConfig

Tensors = dict[str, Tensor]
LAYERS, D, H, K, F, V, CONTEXT = 3, 48, 4, 12, 80, 101, 40
BIASES = dict(attention_bias=True, attention_output_bias=True, ffn_bias=True, norm_bias=True)


@dataclass(frozen=True)
class Family:
    name: str
    reference: Callable[[], nn.Module]
    config: ModelConfig
    to_ours: Callable[[Tensors], Tensors]


def rename(tensors: Tensors, table: dict[str, str], prefix: str, target: str) -> Tensors:
    return {
        f"{target}{ours}.{kind}": tensors[f"{prefix}{theirs}.{kind}"]
        for ours, theirs in table.items()
        for kind in ("weight", "bias")
        if f"{prefix}{theirs}.{kind}" in tensors
    }


def per_layer(tensors: Tensors, table: dict[str, str], prefix: str) -> Tensors:
    mapped: Tensors = {}
    for i in range(LAYERS):
        mapped |= rename(tensors, table, prefix.format(i), f"blocks.{i}.")
    return mapped


def split_heads(tensors: Tensors, name: str) -> Tensors:
    """Fused rows [H, 3, K] of NeoX and BLOOM."""
    mapped: Tensors = {}
    for i in range(LAYERS):
        for kind in ("weight", "bias"):
            fused = tensors[f"{name.format(i)}.{kind}"]
            parts = fused.view(H, 3, K, -1).unbind(1)
            for ours, part in zip("qkv", parts, strict=True):
                flat = part.reshape(H * K, -1)
                mapped[f"blocks.{i}.attn.{ours}.{kind}"] = flat if kind == "weight" else flat[:, 0]
    return mapped


def gptj(t: Tensors) -> Tensors:
    table = {"norm1": "ln_1", "attn.q": "attn.q_proj", "attn.k": "attn.k_proj"}
    table |= {"attn.v": "attn.v_proj", "attn.o": "attn.out_proj"}
    table |= {"ffn.up": "mlp.fc_in", "ffn.down": "mlp.fc_out"}
    ends = {"embed": "transformer.wte", "final_norm": "transformer.ln_f", "head": "lm_head"}
    return per_layer(t, table, "transformer.h.{}.") | rename(t, ends, "", "")


def gpt2(t: Tensors) -> Tensors:
    norms = {"norm1": "ln_1", "norm2": "ln_2"}
    ends = {"embed": "wte", "position_embed": "wpe", "final_norm": "ln_f"}
    mapped = per_layer(t, norms, "transformer.h.{}.") | rename(t, ends, "transformer.", "")
    for i in range(LAYERS):
        layer, target = f"transformer.h.{i}.", f"blocks.{i}."
        for kind in ("weight", "bias"):
            fused = t[f"{layer}attn.c_attn.{kind}"]
            for ours, part in zip("qkv", fused.split(D, dim=-1), strict=True):
                mapped[f"{target}attn.{ours}.{kind}"] = part.T if kind == "weight" else part
            for ours, theirs in (
                ("attn.o", "attn.c_proj"),
                ("ffn.up", "mlp.c_fc"),
                ("ffn.down", "mlp.c_proj"),
            ):
                tensor = t[f"{layer}{theirs}.{kind}"]
                mapped[f"{target}{ours}.{kind}"] = tensor.T if kind == "weight" else tensor
    return mapped


def neox(t: Tensors) -> Tensors:
    table = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    table |= {"attn.o": "attention.dense"}
    table |= {"ffn.up": "mlp.dense_h_to_4h", "ffn.down": "mlp.dense_4h_to_h"}
    ends = {"embed": "gpt_neox.embed_in", "final_norm": "gpt_neox.final_layer_norm"}
    ends |= {"head": "lm_head"}
    layer = "gpt_neox.layers.{}."
    return (
        per_layer(t, table, layer)
        | split_heads(t, layer + "attention.query_key_value")
        | rename(t, ends, "", "")
    )


def opt(t: Tensors) -> Tensors:
    table = {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"}
    table |= {f"attn.{x}": f"self_attn.{x}_proj" for x in "qkv"} | {"attn.o": "self_attn.out_proj"}
    table |= {"ffn.up": "fc1", "ffn.down": "fc2"}
    ends = {"embed": "embed_tokens", "position_embed": "embed_positions"}
    ends |= {"final_norm": "final_layer_norm"}
    return per_layer(t, table, "model.decoder.layers.{}.") | rename(t, ends, "model.decoder.", "")


def bloom(t: Tensors) -> Tensors:
    table = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    table |= {"attn.o": "self_attention.dense"}
    table |= {"ffn.up": "mlp.dense_h_to_4h", "ffn.down": "mlp.dense_4h_to_h"}
    ends = {"embed": "word_embeddings", "embed_norm": "word_embeddings_layernorm"}
    ends |= {"final_norm": "ln_f"}
    layer = "transformer.h.{}."
    return (
        per_layer(t, table, layer)
        | split_heads(t, layer + "self_attention.query_key_value")
        | rename(t, ends, "transformer.", "")
    )


def llama(t: Tensors) -> Tensors:
    table = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    table |= {f"attn.{x}": f"self_attn.{x}_proj" for x in "qkvo"}
    table |= {f"ffn.{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    ends = {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
    return per_layer(t, table, "model.layers.{}.") | rename(t, ends, "", "")


def mixture(t: Tensors) -> Tensors:
    """Mixtral and OLMoE, as transformers keeps them: gate and up of all experts in one tensor."""
    table = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    table |= {f"attn.{x}": f"self_attn.{x}_proj" for x in "qkvo"}
    table |= {f"attn.{x}_norm": f"self_attn.{x}_norm" for x in "qk"}
    table |= {"ffn.router": "mlp.gate"}
    ends = {"embed": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
    mapped = per_layer(t, table, "model.layers.{}.") | rename(t, ends, "", "")
    for i in range(LAYERS):
        both = t[f"model.layers.{i}.mlp.experts.gate_up_proj"]
        gate, up = both.chunk(2, dim=1)
        down = t[f"model.layers.{i}.mlp.experts.down_proj"]
        for name, tensor in (("gate", gate), ("up", up), ("down", down)):
            mapped[f"blocks.{i}.ffn.experts.{name}.weight"] = tensor
    return mapped


EXPERTS = dict(num_experts=8, norm="rmsnorm", activation="swiglu", tie_embeddings=False)


def shape(**settings: object) -> ModelConfig:
    common = dict(num_layers=LAYERS, d_model=D, num_heads=H, vocab_size=V, max_context=CONTEXT)
    return ModelConfig(**(common | settings))  # type: ignore[arg-type]


FAMILIES = [
    Family(
        "gptj",
        lambda: GPTJForCausalLM(
            GPTJConfig(
                vocab_size=V,
                n_positions=CONTEXT,
                n_embd=D,
                n_layer=LAYERS,
                n_head=H,
                rotary_dim=8,
                n_inner=F,
                resid_pdrop=0,
                embd_pdrop=0,
                attn_pdrop=0,
            )
        ),
        shape(
            block="parallel",
            rotary_dims=8,
            rotary_layout="interleaved",
            d_ff=F,
            ffn_bias=True,
            norm_bias=True,
            tie_embeddings=False,
            head_bias=True,
        ),
        gptj,
    ),
    Family(
        "gpt2",
        lambda: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=V,
                n_positions=CONTEXT,
                n_embd=D,
                n_layer=LAYERS,
                n_head=H,
                resid_pdrop=0,
                embd_pdrop=0,
                attn_pdrop=0,
                n_inner=F,
            )
        ),
        shape(position="learned", d_ff=F, **BIASES),
        gpt2,
    ),
    Family(
        "gpt_neox",
        lambda: GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=V,
                hidden_size=D,
                num_hidden_layers=LAYERS,
                num_attention_heads=H,
                intermediate_size=F,
                max_position_embeddings=CONTEXT,
                rotary_pct=0.5,
                use_parallel_residual=True,
                hidden_dropout=0,
                attention_dropout=0,
            )
        ),
        shape(
            block="parallel_two_norms",
            rotary_dims=6,
            activation="gelu",
            d_ff=F,
            tie_embeddings=False,
            **BIASES,
        ),
        neox,
    ),
    Family(
        "opt",
        lambda: OPTForCausalLM(
            OPTConfig(
                vocab_size=V,
                hidden_size=D,
                num_hidden_layers=LAYERS,
                ffn_dim=F,
                num_attention_heads=H,
                max_position_embeddings=CONTEXT,
                dropout=0,
                word_embed_proj_dim=D,
                pad_token_id=1,
            )
        ),
        shape(position="learned", learned_position_offset=2, activation="relu", d_ff=F, **BIASES),
        opt,
    ),
    Family(
        "bloom",
        lambda: BloomForCausalLM(
            BloomConfig(
                vocab_size=V,
                hidden_size=D,
                n_layer=LAYERS,
                n_head=H,
                hidden_dropout=0,
                attention_dropout=0,
            )
        ),
        shape(position="alibi", embedding_norm=True, **BIASES),
        bloom,
    ),
    Family(
        "llama",
        lambda: LlamaForCausalLM(
            LlamaConfig(
                vocab_size=V,
                hidden_size=D,
                num_hidden_layers=LAYERS,
                num_attention_heads=H,
                num_key_value_heads=2,
                intermediate_size=F,
                max_position_embeddings=CONTEXT,
                rms_norm_eps=1e-5,
                tie_word_embeddings=False,
            )
        ),
        shape(norm="rmsnorm", activation="swiglu", num_kv_heads=2, d_ff=F, tie_embeddings=False),
        llama,
    ),
    Family(
        "mixtral",
        lambda: MixtralForCausalLM(
            MixtralConfig(
                vocab_size=V,
                hidden_size=D,
                intermediate_size=F,
                num_hidden_layers=LAYERS,
                num_attention_heads=H,
                num_key_value_heads=2,
                num_local_experts=8,
                num_experts_per_tok=2,
                max_position_embeddings=CONTEXT,
                rms_norm_eps=1e-5,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6},
                sliding_window=None,
            )
        ),
        shape(num_kv_heads=2, rotary_base=1e6, d_ff=F, experts_per_token=2, **EXPERTS),
        mixture,
    ),
    Family(
        "olmoe",
        lambda: OlmoeForCausalLM(
            OlmoeConfig(
                vocab_size=V,
                hidden_size=D,
                intermediate_size=24,
                num_hidden_layers=LAYERS,
                num_attention_heads=H,
                num_key_value_heads=H,
                num_experts=8,
                num_experts_per_tok=3,
                max_position_embeddings=CONTEXT,
                pad_token_id=None,
                eos_token_id=None,
            )
        ),
        shape(
            qk_norm="projection",
            expert_d_ff=24,
            experts_per_token=3,
            router_normalize=False,
            **EXPERTS,
        ),
        mixture,
    ),
]


def randomised(model: nn.Module) -> nn.Module:
    """Every parameter drawn anew: fresh biases are zero and gains one, which hides mistakes."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15)
            if parameter.ndim == 1:
                parameter.add_(0.5)
    return model
