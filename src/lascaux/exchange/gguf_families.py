"""Architectures of GGUF files, a table each, as `families.py` has them for config.json.

Keys of metadata stand after the architecture's name and a dot. llama.cpp's converter turns GPT-2's
matrices round, puts fused q, k and v below each other, and interleaves the rows of Llama's q and k.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import torch

from lascaux.checkpoint.files import shown
from lascaux.config.schema import ModelConfig
from lascaux.errors import CheckpointError, suggest
from lascaux.exchange.choose import read_model
from lascaux.exchange.families import ALL_BIASES, Family
from lascaux.exchange.gguf_file import GgufFile
from lascaux.exchange.rows import Names, each, same
from lascaux.exchange.settings import LARGEST_LENGTH, Settings
from lascaux.exchange.stored import Stored
from lascaux.model.positions import frequencies

ROPE_FACTORS = "rope_freqs.weight"
Keys = dict[str, tuple[str, Any]]
ALL: Keys = {
    "num_layers": ("block_count", None),
    "d_model": ("embedding_length", None),
    "num_heads": ("attention.head_count", None),
    "max_context": ("context_length", None),
    "d_ff": ("feed_forward_length", None),
}
LAYER_NORM: Keys = {"norm_eps": ("attention.layer_norm_epsilon", 1e-5)}
RMS_NORM: Keys = {"norm_eps": ("attention.layer_norm_rms_epsilon", 1e-5)}
GROUPED: Keys = {
    "num_kv_heads": ("attention.head_count_kv", None),
    "head_dim": ("attention.key_length", None),
    "rotary_base": ("rope.freq_base", 10000.0),
}
EXPERTS: Keys = {
    "num_experts": ("expert_count", None),
    "experts_per_token": ("expert_used_count", None),
}
SOFTMAX = {"expert_gating_func": 1, "expert_weights_scale": 1.0}
ENDS = same(embed="token_embd", final_norm="output_norm", head="output")
NORM = same(norm1="attn_norm", attn_o="attn_output")
TWO_NORMS = NORM + same(norm2="ffn_norm")
UP_DOWN = same(ffn_up="ffn_up", ffn_down="ffn_down")
FUSED: Names = (("attn.q attn.k attn.v", "attn_qkv", "below"), *TWO_NORMS, *UP_DOWN)
INTERLEAVED = each("q k", "attn.{part}", "attn_{part}", "interleaved") + same(attn_v="attn_v")
MIXTURE: Names = (
    ("ffn.router", "ffn_gate_inp", "same"),
    *each("gate up down", "ffn.experts.{part}", "ffn_{part}_exps"),
)


def family(
    name: str,
    settings: Keys,
    block: Names,
    fixed: dict[str, Any],
    ends: Names = ENDS,
    demanded: dict[str, Any] | None = None,
) -> Family:
    """One general.architecture."""
    demanded = {"rope.scale_linear": 1.0} | (demanded or {})
    return Family(
        name=name,
        architecture=name,
        settings={
            ours: (f"{name}.{key}", default) for ours, (key, default) in (ALL | settings).items()
        },
        fixed=fixed,
        demanded={f"{name}.{key}": value for key, value in demanded.items()},
        scaling=f"{name}.rope.scaling.type",
        prefix="",
        ends=ends,
        layer="blk.{}.",
        block=block,
    )


GPT2 = family(
    "gpt2",
    LAYER_NORM,
    FUSED,
    dict(position="learned", activation="gelu_tanh") | ALL_BIASES,
    ends=ENDS + same(position_embed="position_embd"),
)
GPTJ = family(
    "gptj",
    LAYER_NORM | {"rotary_dims": ("rope.dimension_count", None)},
    NORM + UP_DOWN + each("q k v", "attn.{part}", "attn_{part}"),
    dict(
        block="parallel",
        rotary_layout="interleaved",
        activation="gelu_tanh",
        ffn_bias=True,
        norm_bias=True,
    ),
)
GPTNEOX = family(
    "gptneox",
    LAYER_NORM
    | {
        "block": ("use_parallel_residual", True),
        "rotary_dims": ("rope.dimension_count", None),
        "rotary_base": ("rope.freq_base", 10000.0),
    },
    FUSED,
    dict(activation="gelu", ffn_bias=True, norm_bias=True),
)
BLOOM = family(
    "bloom",
    LAYER_NORM,
    FUSED,
    dict(position="alibi", embedding_norm=True, activation="gelu_tanh") | ALL_BIASES,
    ends=ENDS + same(embed_norm="token_embd_norm"),
)
LLAMA = family(
    "llama",
    RMS_NORM | GROUPED,
    TWO_NORMS + INTERLEAVED + each("gate up down", "ffn.{part}", "ffn_{part}"),
    dict(norm="rmsnorm", activation="swiglu"),
)
MIXTRAL = family(
    "llama",
    RMS_NORM | GROUPED | EXPERTS,
    TWO_NORMS + INTERLEAVED + MIXTURE,
    dict(norm="rmsnorm", activation="swiglu", router_normalize=True),
    demanded=SOFTMAX | {"expert_weights_norm": True, "expert_shared_count": 0},
)
OLMOE = family(
    "olmoe",
    RMS_NORM | GROUPED | EXPERTS,
    TWO_NORMS + each("q k v q_norm k_norm", "attn.{part}", "attn_{part}") + MIXTURE,
    dict(norm="rmsnorm", activation="swiglu", router_normalize=False, qk_norm="projection"),
    demanded=SOFTMAX | {"expert_weights_norm": False, "attention.clamp_kqv": None},
)
LLAMA31 = dict(
    rotary_scaling="llama3",
    rotary_low_freq_factor=1.0,
    rotary_high_freq_factor=4.0,
    rotary_original_context=8192,
)
"""of Llama 3.1, 3.2 and 3.3; GGUF keeps only what comes of it, a factor for each frequency"""
WITHOUT_EFFECT = (
    *("vocab_size", "expert_used_count", "expert_count", "tensor_data_layout"),
    *("rope.scaling.original_context_length", "rope.scaling.finetuned"),
)
"""or held against the tensors' shapes"""
ARCHITECTURES = {each.name: each for each in (GPT2, GPTJ, GPTNEOX, BLOOM, LLAMA, OLMOE)}


def read_gguf_model(file: GgufFile) -> tuple[Family, Settings, ModelConfig]:
    """The table, the settings and the network of a file.

    Raises: CheckpointError for an architecture that is not known, ConfigError for what our network
    has not.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path}: general.architecture {shown(name)} is not known to Lascaux"
            f"{suggest(str(name), ARCHITECTURES)}; it reads {', '.join(ARCHITECTURES)}"
        )
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            f"{file.path} is one of {shown(file.metadata['split.count'])} parts of a model; put "
            "them together with llama.cpp's gguf-split --merge"
        )
    embedding = file.tensors.get("token_embd.weight")
    content = {
        key: value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in file.metadata.items()
        if key.startswith(f"{name}.")
    }
    content["vocab_size"] = embedding.shape[0] if embedding is not None else None
    if content.get(f"{name}.rope.scaling.factor") is not None:  # llama.cpp's reading, too
        content.setdefault(f"{name}.rope.scaling.type", "linear")
    s = Settings(content, file.path)
    mixture = name == "llama" and bool(s.find("llama.expert_count")[1])
    table = with_what_is_there(MIXTRAL if mixture else ARCHITECTURES[name], file)
    for key in WITHOUT_EFFECT:
        s.find(f"{name}.{key}")
    model = read_model(table, s)
    check_widths(name, s, model)
    if ROPE_FACTORS in file.tensors and model.position == "rotary":
        model = with_rope_factors(model, file.tensors.pop(ROPE_FACTORS))
    return table, s, model


def with_rope_factors(model: ModelConfig, stored: Stored) -> ModelConfig:
    """The network of the factors that divide rotary frequencies.

    Raises: CheckpointError for others than Llama 3.1's.
    """
    if stored.shape == (model.rotary_width // 2,) and model.rotary_scaling == "none":
        found = stored.read()
        factor = float(found.max())
        if 1 <= factor < math.inf:
            scaled = dataclasses.replace(model, **LLAMA31, rotary_factor=factor)
            cpu = torch.device("cpu")
            wanted = frequencies(model, cpu) / frequencies(scaled, cpu)
            if torch.allclose(found, wanted, rtol=1e-5):
                return scaled
    raise CheckpointError(
        f"{stored.path}: '{stored.name}' changes rotary frequencies in another way than Llama 3.1; "
        "import the model's Hugging Face folder instead"
    )


def with_what_is_there(table: Family, file: GgufFile) -> Family:
    """The table with what only the presence of tensors tells."""
    present = file.tensors.keys()
    attention = {"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"}
    found = {
        "tie_embeddings": "output.weight" not in present,
        "head_bias": "output.bias" in present,
        "attention_bias": not attention.isdisjoint(present),
        "attention_output_bias": "blk.0.attn_output.bias" in present,
        "ffn_bias": "blk.0.ffn_down.bias" in present,
    }
    return dataclasses.replace(table, fixed={**table.fixed, **found})


def check_widths(name: str, s: Settings, model: ModelConfig) -> None:
    """What follows from other settings must say the same. Raises: ConfigError."""
    values = s.optional(f"{name}.attention.value_length")
    if values not in (None, model.head_width):
        raise s.error(f"{name}.attention.value_length", f"attention.key_length {model.head_width}")
    turned = s.optional(f"{name}.rope.dimension_count")
    if model.position == "rotary" and turned not in (None, model.rotary_width):
        raise s.error(f"{name}.rope.dimension_count", f"the width of a head, {model.head_width}")
    window = s.optional(f"{name}.attention.sliding_window", LARGEST_LENGTH)
    if window is not None and window < model.max_context:
        raise s.error(
            f"{name}.attention.sliding_window",
            f"at least context_length {model.max_context} (Lascaux's attention has no window)",
        )
